"""Rows cut over context-parallel ranks: which tokens a rank holds, and keys and values made whole again for attention.

A row is cut into 2 * size equal chunks and rank r holds chunks r and 2 * size - 1 - r, so that causal attention costs every
rank the same. Queries stay where they are; keys and values are gathered (backward: reduce-scattered), so each rank attends,
routes and aligns for its own queries over the whole row, document boundaries included.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_megatron.parallel.state import ParallelState


def local_positions(length: int, parallel: ParallelState, device) -> Tensor | None:
    """Places in the row of this rank's tokens, int32 [length / size], in the order it holds them; None when rows are not cut."""
    if parallel.cp_size == 1:
        return None
    return _places(length, parallel.cp_rank, parallel.cp_size).to(device)


def _places(length: int, rank: int, size: int) -> Tensor:
    chunks = torch.arange(length, dtype=torch.int32).chunk(2 * size)
    return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))


class _GatherKV(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own_nbx: Tensor, group) -> Tensor:
        ctx.group, size = group, dist.get_world_size(group)
        parts = own_nbx.new_empty((size * own_nbx.shape[0], *own_nbx.shape[1:]))
        dist.all_gather_into_tensor(parts, own_nbx.contiguous(), group=group)
        halves = parts.unflatten(0, (size, 2, -1))  # of rank r: chunk r, then chunk 2 * size - 1 - r
        return torch.cat((halves[:, 0], halves[:, 1].flip(0))).flatten(0, 1)

    @staticmethod
    def backward(ctx, grad_nbx: Tensor):
        size = dist.get_world_size(ctx.group)
        chunks = grad_nbx.unflatten(0, (2 * size, -1))
        parts = torch.stack((chunks[:size], chunks[size:].flip(0)), dim=1).flatten(0, 2)
        own = parts.new_empty((len(parts) // size, *parts.shape[1:]))
        dist.reduce_scatter_tensor(own, parts, group=ctx.group)
        return own, None


def gather_kv(own_nbx: Tensor, group) -> Tensor:
    """`[N / size, B, ...]` of each rank -> `[N, B, ...]` in the row's order, on all of them. Backward sums their gradients."""
    return _GatherKV.apply(own_nbx, group)
