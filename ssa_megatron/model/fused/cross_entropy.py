"""Cross-entropy of logits whose vocabulary is divided over tensor-parallel ranks, without an fp32 copy of the logits.

Forward reads the logits once: an online maximum and sum, and the label's logit. Backward overwrites the logits with their
gradient, so they must not be used again. Columns that only pad the vocabulary count as minus infinity. Sums are fp32.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


def reference(logits: Tensor, labels: Tensor, real: int) -> Tensor:
    """As `cross_entropy` on one rank, in plain PyTorch."""
    flat = logits[..., :real].float().flatten(0, -2)
    return torch.nn.functional.cross_entropy(flat, labels.flatten(), reduction="none").view(labels.shape)


def cross_entropy(logits: Tensor, labels: Tensor, real: int, group) -> Tensor:
    """fp32 loss per token, nats, of this rank's logits `[..., V / tp]` and int64 labels `[...]`.

    real: columns of this rank that are vocabulary; the others are padding. group: the tensor-parallel ranks.
    """
    return _CrossEntropy.apply(logits, labels, real, group)


@triton.jit
def _statistics(logits_ptr, labels_ptr, stats_ptr, width, real, first, rows, BLOCK: tl.constexpr):
    """Per row: maximum, sum of exp(logit - maximum), and the label's logit (0 where another rank has it)."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * width
    highest = float("-inf")
    total = 0.0
    for start in range(0, real, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(base + column, mask=column < real, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(x, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(x - new), 0)
        highest = new
    label = tl.load(labels_ptr + row) - first
    mine = (label >= 0) & (label < real)
    tl.store(stats_ptr + row, highest)
    tl.store(stats_ptr + rows + row, total)
    tl.store(stats_ptr + 2 * rows + row, tl.load(base + label, mask=mine, other=0.0).to(tl.float32))


@triton.jit
def _gradient(logits_ptr, labels_ptr, lse_ptr, upstream_ptr, width, real, first, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * width + column
    lse, upstream = tl.load(lse_ptr + row), tl.load(upstream_ptr + row)
    label = tl.load(labels_ptr + row) - first
    x = tl.load(at, mask=column < real, other=float("-inf")).to(tl.float32)
    gradient = (tl.exp(x - lse) - (column == label).to(tl.float32)) * upstream
    tl.store(at, gradient, mask=column < width)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, real: int, group) -> Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        rows, width = labels.numel(), logits.shape[-1]
        ranks, first = dist.get_world_size(group), dist.get_rank(group) * width
        stats = torch.empty((3, rows), dtype=torch.float32, device=logits.device)
        block = min(triton.next_power_of_2(width), 4 * BLOCK)
        _statistics[(rows,)](logits, labels, stats, width, real, first, rows, block, num_warps=16)
        top, total, of_label = stats
        if ranks > 1:
            highest = top.clone()
            dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
            sums = torch.stack((total * torch.exp(top - highest), of_label))
            dist.all_reduce(sums, group=group)
            top, (total, of_label) = highest, sums
        lse = top + total.log()
        ctx.save_for_backward(logits, labels, lse)
        ctx.real, ctx.first = real, first
        return (lse - of_label).view(labels.shape)

    @staticmethod
    def backward(ctx, upstream: Tensor):
        logits, labels, lse = ctx.saved_tensors
        rows, width = labels.numel(), logits.shape[-1]
        _gradient[(rows, triton.cdiv(width, BLOCK))](
            logits, labels, lse, upstream.contiguous().float(), width, ctx.real, ctx.first, BLOCK, num_warps=8
        )
        return logits, None, None, None
