"""SwiGLU: `silu(gate) * up` for a projection that holds gate and up next to each other, forward and backward.

One kernel each way reads every element once. The products are fp32 and rounded once.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


def reference(x: Tensor) -> Tensor:
    """`[..., 2 * F] -> [..., F]` in x's dtype."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(x: Tensor) -> Tensor:
    """`[..., 2 * F] -> [..., F]`, floating point: silu of the first half of the last dimension times the second half."""
    return _SwiGLU.apply(x)


@triton.jit
def _forward(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=here).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=here).to(tl.float32)
    tl.store(y_ptr + row * width + column, gate * tl.sigmoid(gate) * up, mask=here)


@triton.jit
def _backward(x_ptr, dy_ptr, dx_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    at = row * 2 * width + column
    gate = tl.load(x_ptr + at, mask=here).to(tl.float32)
    up = tl.load(x_ptr + at + width, mask=here).to(tl.float32)
    dy = tl.load(dy_ptr + row * width + column, mask=here).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    tl.store(dx_ptr + at, dy * up * sigmoid * (1 + gate * (1 - sigmoid)), mask=here)
    tl.store(dx_ptr + at + width, dy * gate * sigmoid, mask=here)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        width = x.shape[-1] // 2
        y = x.new_empty(*x.shape[:-1], width)
        _forward[(y.numel() // width, triton.cdiv(width, BLOCK))](x, y, width, BLOCK, num_warps=4)
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        (x,) = ctx.saved_tensors
        dx, width = torch.empty_like(x), x.shape[-1] // 2
        _backward[(x.numel() // (2 * width), triton.cdiv(width, BLOCK))](
            x, dy.contiguous(), dx, width, BLOCK, num_warps=4
        )
        return dx
