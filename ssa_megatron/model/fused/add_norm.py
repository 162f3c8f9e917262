"""RMSNorm with the residual stream around it: `s = x + delta`, `y = norm(s) * weight`, forward and backward.

Both the sum and its norm are results, so backward adds the two gradients in the kernel instead of in a pass of its own.
Statistics and products are fp32 and rounded once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # per program of backward, whose partial weight gradients are summed in a fixed order


def reference(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `add_norm`, in plain PyTorch."""
    total = x if delta is None else x + delta
    wide = total.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return total, (normed * weight.float()).to(total.dtype)


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(`x + delta`, its RMSNorm times `weight`), both `[..., H]` in x's dtype; delta None: (x, its norm)."""
    return _AddNorm.apply(x, delta, weight, eps)


@triton.jit
def _forward(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, rstd_ptr, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here, at = column < width, row * width + column
    x = tl.load(x_ptr + at, mask=here, other=0.0)
    if ADD:
        x = (x.to(tl.float32) + tl.load(delta_ptr + at, mask=here, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask=here)
    wide = x.to(tl.float32)
    rstd = 1 / tl.sqrt_rn(tl.sum(wide * wide, 0) / width + eps)
    tl.store(rstd_ptr + row, rstd)
    tl.store(y_ptr + at, wide * rstd * tl.load(weight_ptr + column, mask=here, other=0.0).to(tl.float32), mask=here)


@triton.jit
def _backward(
    sum_ptr, weight_ptr, rstd_ptr, dsum_ptr, dy_ptr, dx_ptr, partial_ptr, rows, width,
    PASSED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """PASSED: the sum itself has a gradient, too."""
    column = tl.arange(0, BLOCK)
    here = column < width
    weight = tl.load(weight_ptr + column, mask=here, other=0.0).to(tl.float32)
    partial = tl.zeros((BLOCK,), tl.float32)
    for i in range(ROWS):
        row = (tl.program_id(0) * ROWS + i).to(tl.int64)
        inside = here & (row < rows)
        at = row * width + column
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normed = tl.load(sum_ptr + at, mask=inside, other=0.0).to(tl.float32) * rstd
        dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
        partial += dy * normed
        scaled = dy * weight
        dx = (scaled - normed * (tl.sum(scaled * normed, 0) / width)) * rstd
        if PASSED:
            dx += tl.load(dsum_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask=inside)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * width + column, partial, mask=here)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float):
        x = x.contiguous()
        width = x.shape[-1]
        rows = x.numel() // width
        total = x if delta is None else torch.empty_like(x)
        y, rstd = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
        block = triton.next_power_of_2(width)
        _forward[(rows,)](
            x, x if delta is None else delta.contiguous(), weight, total, y, rstd, width, eps,
            delta is not None, block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
        ctx.save_for_backward(total, weight, rstd)
        ctx.adds = delta is not None
        ctx.set_materialize_grads(False)
        return total.view_as(total) if delta is None else total, y

    @staticmethod
    def backward(ctx, dsum: Tensor | None, dy: Tensor | None):
        total, weight, rstd = ctx.saved_tensors
        if dy is None:
            return dsum, dsum if ctx.adds else None, None, None
        width = total.shape[-1]
        rows = total.numel() // width
        dx = torch.empty_like(total)
        programs = triton.cdiv(rows, ROWS)
        partial = total.new_empty(programs, width, dtype=torch.float32)
        block = triton.next_power_of_2(width)
        _backward[(programs,)](
            total, weight, rstd, dy if dsum is None else dsum.contiguous(), dy.contiguous(), dx, partial, rows, width,
            dsum is not None, ROWS, block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
        return dx, dx if ctx.adds else None, partial.sum(0).to(weight.dtype), None
