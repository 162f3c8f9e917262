"""Splits a fused q/k/v projection and rotates q and k, in one pass each way.

megatron-core lays the projection out per query group: the group's query heads, its key head, its value head. The kernel reads it
once and writes q, k and v contiguous in the layout attention wants, batch first, so that nothing is copied later.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_megatron.model.rope import apply_rotary

TOKENS = 16  # per program


def reference(mixed: Tensor, table: tuple[Tensor, Tensor], group: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `split_and_rotate`, in plain PyTorch."""
    n, batch = mixed.shape[:2]
    parts = mixed.view(n, batch, -1, group + 2, dim)
    q, k, v = parts[..., :group, :], parts[..., group : group + 1, :], parts[..., group + 1 :, :]
    q, k, v = (x.reshape(n, batch, -1, dim) for x in (q, k, v))
    return apply_rotary(q, table), apply_rotary(k, table), v


def split_and_rotate(
    mixed: Tensor, table: tuple[Tensor, Tensor], group: int, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[n, B, groups * group, dim]`, k and v `[n, B, groups, dim]`, q and k rotated.

    mixed: `[n, B, groups * (group + 2) * dim]`. table: cos and sin, fp32 `[n, B, 1, dim]`, equal in both halves of `dim`. group:
    query heads per key/value head. The three results are views of batch-first storage.
    """
    return _SplitAndRotate.apply(mixed, *table, group, dim)


@triton.jit
def _move(
    mixed_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, n, batch, groups,
    GROUP: tl.constexpr, HALF: tl.constexpr, HALF_P: tl.constexpr, TOKENS: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """mixed -> q, k, v with q and k rotated; BACK: the gradients of q, k, v -> the gradient of mixed, rotated back."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # of n * batch, in mixed's order
    head = tl.program_id(1)  # of groups * (GROUP + 2)
    group, slot = head // (GROUP + 2), head % (GROUP + 2)
    channel = tl.arange(0, HALF_P)[None, :]
    here = (token[:, None] < n * batch) & (channel < HALF)
    at = (token[:, None].to(tl.int64) * groups * (GROUP + 2) + head) * 2 * HALF + channel
    row = (token % batch).to(tl.int64) * n + token // batch  # of batch * n, in q, k and v's order
    if slot < GROUP:
        base = q_ptr
        out = (row[:, None] * groups * GROUP + group * GROUP + slot) * 2 * HALF + channel
    else:
        base = k_ptr if slot == GROUP else v_ptr
        out = (row[:, None] * groups + group) * 2 * HALF + channel
    if BACK:
        first, second = tl.load(base + out, mask=here), tl.load(base + out + HALF, mask=here)
    else:
        first, second = tl.load(mixed_ptr + at, mask=here), tl.load(mixed_ptr + at + HALF, mask=here)
    if slot <= GROUP:
        angle = token[:, None].to(tl.int64) * 2 * HALF + channel
        cos, sin = tl.load(cos_ptr + angle, mask=here), tl.load(sin_ptr + angle, mask=here)
        a, b = first.to(tl.float32), second.to(tl.float32)
        if BACK:
            sin = -sin
        first, second = (a * cos - b * sin).to(first.dtype), (b * cos + a * sin).to(second.dtype)
    if BACK:
        tl.store(mixed_ptr + at, first, mask=here)
        tl.store(mixed_ptr + at + HALF, second, mask=here)
    else:
        tl.store(base + out, first, mask=here)
        tl.store(base + out + HALF, second, mask=here)


def _launch(mixed: Tensor, qkv_bnhd: tuple[Tensor, ...], cos: Tensor, sin: Tensor, group: int, *, back: bool) -> None:
    n, batch = mixed.shape[:2]
    dim, groups = qkv_bnhd[0].shape[-1], qkv_bnhd[1].shape[2]
    grid = (triton.cdiv(n * batch, TOKENS), groups * (group + 2))
    _move[grid](
        mixed, *qkv_bnhd, cos, sin, n, batch, groups,
        group, dim // 2, triton.next_power_of_2(dim // 2), TOKENS, back, num_warps=2,
    )  # fmt: skip


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed: Tensor, cos: Tensor, sin: Tensor, group: int, dim: int):
        n, batch, width = mixed.shape
        groups = width // (dim * (group + 2))
        shapes = [(batch, n, groups * group, dim), (batch, n, groups, dim), (batch, n, groups, dim)]
        qkv = tuple(mixed.new_empty(shape) for shape in shapes)
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.group = mixed.shape, group
        _launch(mixed.contiguous(), qkv, cos, sin, group, back=False)
        return tuple(x.transpose(0, 1) for x in qkv)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        cos, sin = ctx.saved_tensors
        qkv = tuple(x.transpose(0, 1).contiguous() for x in grads)
        mixed = qkv[0].new_empty(ctx.shape)
        _launch(mixed, qkv, cos, sin, ctx.group, back=True)
        return mixed, None, None, None, None
