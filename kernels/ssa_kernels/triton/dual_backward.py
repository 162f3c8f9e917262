"""Backward of both streams: dQ of both in one pass over key tiles, dK and dV by the dense and the sparse kernels.

With p = exp2(score - lse) of the stream a key belongs to most narrowly (the sparse one where its block is selected,
else the full one), P_sparse is p inside the selection and P_full is p, times exp2(lse_sparse - lse_full) <= 1 inside:
one exponential, right however far apart the two sums are. Both streams' dS are added before the one product with K.
Every sum has a fixed order. It refuses nothing, like triton_dual.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_kernels.triton import dense_backward as triton_dense_backward
from ssa_kernels.triton import sparse as triton_sparse
from ssa_kernels.triton.dense import Dense, tiles
from ssa_kernels.triton.dual import _chosen, _key_range, _row_bits, selection_bits
from ssa_kernels.triton.routing import LOG2E


@triton.jit
def _dq_tiles(
    dq, q, do_full, do_sparse, lse_full, lse_sparse, delta_full, delta_sparse, k_desc, v_desc, bits_ptr, b, h,
    low, high, rows, s, n, scale_log2, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    SHIFT: tl.constexpr, WORD: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    step = tl.arange(0, KEYS)
    ratio = tl.exp2(lse_sparse - lse_full)
    for first in range(low, high, KEYS):
        k = k_desc.load([b, first, h * D]).reshape(KEYS, D)
        v = v_desc.load([b, first, h * D]).reshape(KEYS, D)
        bits, rest = _row_bits(bits_ptr, first, rows, s, n, SHIFT, WORD, HAS_DOCS)
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2
        chosen = _chosen(bits[:, None], rest[:, None] if MASKED else rest, step[None, :], SHIFT, HAS_DOCS)
        weight = tl.exp2(score - tl.where(chosen, lse_sparse[:, None], lse_full[:, None]))
        if MASKED:
            key = first + step
            seen = key[None, :] <= rows[:, None]
            if HAS_DOCS:
                seen = seen & (key[None, :] >= s[:, None])
            weight = tl.where(seen, weight, 0.0)
        d_full = tl.dot(do_full, tl.trans(v), input_precision="tf32x3") - delta_full[:, None]
        d_full *= tl.where(chosen, ratio[:, None], 1.0)
        d_sparse = tl.dot(do_sparse, tl.trans(v), input_precision="tf32x3") - delta_sparse[:, None]
        d_score = weight * (d_full + tl.where(chosen, d_sparse, 0.0))
        dq = tl.dot(d_score.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@triton.jit
def _backward_q(
    q_ptr, k_desc, v_desc, bits_ptr, doc_ptr, do_full_ptr, do_sparse_ptr, lse_full_ptr, lse_sparse_ptr,
    delta_full_ptr, delta_sparse_ptr, dq_ptr,
    n, words, n_pad, scale, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SHIFT: tl.constexpr, WORD: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """One program per (row tile, query head)."""
    head, b = tl.program_id(1), tl.program_id(2)
    h = head // (h_q // h_kv)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    real = rows < n
    s, own, low, inner, outer, high = _key_range(doc_ptr, b.to(tl.int64) * n, rows, n, ROWS, KEYS, HAS_DOCS)
    bits_ptr += (b.to(tl.int64) * h_kv + h) * words * n
    row_at = (b.to(tl.int64) * n + rows) * h_q + head
    at = row_at[:, None] * D + tl.arange(0, D)[None, :]
    # Computed, q stays in registers, and its products read only their other side from shared memory, which limits here.
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0) + 0.0
    do_full = tl.load(do_full_ptr + at, mask=real[:, None], other=0.0)
    do_sparse = tl.load(do_sparse_ptr + at, mask=real[:, None], other=0.0)
    lse_full = tl.load(lse_full_ptr + (b.to(tl.int64) * h_q + head) * n_pad + rows, mask=real, other=0.0)
    lse_sparse = tl.load(lse_sparse_ptr + row_at, mask=real, other=0.0)
    delta_full = tl.load(delta_full_ptr + row_at, mask=real, other=0.0)
    delta_sparse = tl.load(delta_sparse_ptr + row_at, mask=real, other=0.0)
    dq = tl.zeros([ROWS, D], tl.float32)
    if HAS_DOCS:
        dq = _dq_tiles(
            dq, q, do_full, do_sparse, lse_full, lse_sparse, delta_full, delta_sparse, k_desc, v_desc, bits_ptr, b, h,
            low, inner, rows, s, n, scale_log2, D, KEYS, True, SHIFT, WORD, HAS_DOCS,
        )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do_full, do_sparse, lse_full, lse_sparse, delta_full, delta_sparse, k_desc, v_desc, bits_ptr, b, h,
        inner, outer, rows, own, n, scale_log2, D, KEYS, False, SHIFT, WORD, HAS_DOCS,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do_full, do_sparse, lse_full, lse_sparse, delta_full, delta_sparse, k_desc, v_desc, bits_ptr, b, h,
        outer, high, rows, s, n, scale_log2, D, KEYS, True, SHIFT, WORD, HAS_DOCS,
    )  # fmt: skip
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=real[:, None])


def backward_q(
    q, k, v, blocks, size: int, scale: float, doc_starts, do_full, do_sparse, lse_full, lse_sparse,
    delta_full, delta_sparse, config,
) -> Tensor:  # fmt: skip
    """dq [B, N, Hq, D] of both streams together."""
    batch, n, h_q, dim = q.shape
    dq = torch.empty_like(q)
    bits, word = selection_bits(blocks, n, size, doc_starts)
    rows, keys, warps, stages = config.dual_dq
    _backward_q[(triton.cdiv(n, rows), h_q, batch)](
        q, tiles(k, keys), tiles(v, keys), bits, doc_starts, do_full, do_sparse, lse_full, lse_sparse,
        delta_full, delta_sparse, dq, n, bits.shape[2], lse_full.shape[2], scale, scale * LOG2E, h_q, k.shape[2], dim,
        rows, keys, size.bit_length() - 1, word, HAS_DOCS=doc_starts is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq


def backward(
    q, k, v, blocks, size: int, scale: float, doc_starts, do_full, do_sparse, lse_full, lse_sparse,
    delta_full, delta_sparse, config,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the inputs' dtype; lse as `triton_dual.forward` returns them, delta fp32 [B, N, Hq]."""
    dq = backward_q(
        q, k, v, blocks, size, scale, doc_starts, do_full, do_sparse, lse_full, lse_sparse, delta_full, delta_sparse,
        config,
    )  # fmt: skip
    n, count = q.shape[1], blocks.shape[3]
    delta_full, dense = triton_dense_backward.by_head(delta_full), Dense(n, doc_starts=doc_starts)
    pair = triton_dense_backward.backward_kv(q, k, v, lse_full, do_full, delta_full, scale, dense, config)
    index = triton_sparse.inverse_index(blocks, n, size, doc_starts, None)
    return dq, *triton_sparse.backward_kv(
        q, k, v, index, lse_sparse, do_sparse, delta_sparse, size, count, scale, None, config, pair
    )
