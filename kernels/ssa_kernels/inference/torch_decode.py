"""Cached attention in plain PyTorch, for few queries: the semantics of decode where they are easiest to see.

Everything is computed for all sequences at once from the cache's tensors and device lengths, with masks, and nothing
waits for a GPU. It holds `[B, Hq, T, tokens]` scores, so it suits a CPU and budgets the kernels do not take; it refuses
nothing: `inference.py` has seen the arguments.
"""

import torch
from torch import Tensor

from ssa_kernels.inference.kv_cache import join_halves
from ssa_kernels.reference.torch_routing import _choose


def places(cache, tokens: int) -> Tensor:
    """Where the last T tokens of each sequence lie, int64 [B, T]; negative where a sequence is shorter."""
    lengths = cache.lengths.long()[:, None]
    return torch.where(lengths >= 0, lengths - tokens + torch.arange(tokens, device=cache.device), -1)


def extent(cache) -> int:
    """Tokens that some sequence holds, as the host knows; all that fit while a CUDA graph is captured."""
    capturing = cache.lengths.is_cuda and torch.cuda.is_current_stream_capturing()
    return cache.capacity if capturing else max(1, *cache.host_lengths)


def select(q: Tensor, cache, spec, scale: float) -> Tensor:
    """int32 [B, T, Hkv, block_count] as `kernels.select_blocks` has it; rows before a sequence's begin are -1."""
    t, size = places(cache, q.shape[1]), cache.block_size
    slots = -(-extent(cache) // size)
    own = torch.where(t >= 0, t // size, -1)
    chosen = torch.full((*own.shape, cache.kv_heads, spec.block_count), -1, dtype=torch.int32, device=q.device)
    chosen[..., 0] = own[..., None]
    if spec.block_count > 1:
        kbar = join_halves(cache.every_block(cache.pooled, slots))
        q_bthgd = q.to(kbar.dtype).unflatten(2, (cache.kv_heads, -1)) * scale
        score = torch.einsum("bthgd,bshd->bhgts", q_bthgd, kbar)
        block = torch.arange(slots, device=q.device)
        complete = (block + 1) * size <= t[..., None] + 1  # [B, T, slots]
        score = score.masked_fill(~complete[:, None, None], float("-inf")).softmax(-1).sum(2)
        candidate = block < own[..., None]
        score = torch.where(candidate[:, None], score, -1.0)  # [B, Hkv, T, slots]
        zero = torch.zeros_like(own)[:, None, :, None]
        chosen[..., 1:] = _choose(score, zero, own[:, None, :, None], spec).transpose(1, 2)
    return chosen


def attend(q: Tensor, cache, scale: float, blocks: Tensor | None) -> Tensor:
    """Softmax attention of q [B, T, Hq, D] over every key up to the query, or over those of `blocks`."""
    t, count, heads = places(cache, q.shape[1]), extent(cache), cache.kv_heads
    work = torch.promote_types(q.dtype, torch.float32)
    key = torch.arange(count, device=q.device)
    seen = (key <= t[..., None])[:, :, None]  # [B, T, 1, tokens]
    if blocks is not None:
        slots = -(-count // cache.block_size)
        chosen = torch.zeros(*blocks.shape[:3], slots + 1, dtype=torch.bool, device=q.device)
        chosen.scatter_(3, torch.where(blocks >= 0, blocks, slots).long().clamp(max=slots), True)
        seen = seen & chosen[..., key // cache.block_size]
    seen = seen.transpose(1, 2)[:, :, None]  # [B, Hkv or 1, 1, T, tokens]
    held = (key < cache.lengths[:, None])[:, :, None, None]
    k, v = (torch.where(held, cache.every_token(x, count), 0).to(work) for x in (cache.keys, cache.values))
    score = torch.einsum("bthgd,bnhd->bhgtn", q.to(work).unflatten(2, (heads, -1)) * scale, k)
    some = seen.any(-1, keepdim=True)
    weight = torch.where(some, score.masked_fill(~seen, float("-inf")).softmax(-1), 0.0)
    return torch.einsum("bhgtn,bnhd->bthgd", weight, v).flatten(2, 3).to(q.dtype)
