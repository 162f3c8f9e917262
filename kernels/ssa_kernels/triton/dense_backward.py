"""Backward of dense attention, in two passes whose sums have a fixed order: dQ, then dK and dV.

dQ has the forward pass's loop; dK/dV loop over the rows that see a key tile, for the query group's heads one after the
other. It refuses nothing: `triton_backend.py` has prepared the arguments.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssa_kernels.layout import remembered
from ssa_kernels.triton.dense import PAD, Dense, _interval, _key_tiles, _seen, tiles
from ssa_kernels.triton.gate import row_delta
from ssa_kernels.triton.routing import LOG2E

PROGRAMS = 512  # dK/dV programs that fill a GPU of about 132 multiprocessors with causal work of unequal length


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, k_desc, v_desc, key_start_ptr, b, column, first, last, n_k, scale_log2,
    start, count, turn, jump, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    for i in range(count):
        key = (start + i + tl.where(i < turn, 0, jump)) * KEYS
        k = tl.reshape(k_desc.load([b, key, column]), [KEYS, D])
        v = tl.reshape(v_desc.load([b, key, column]), [KEYS, D])
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        weight = tl.exp2(score * scale_log2 - lse[:, None])
        if MASKED:
            keys = key + tl.arange(0, KEYS)
            seen = _seen(first[:, None], last[:, None], keys[None, :], key_start_ptr, b, n_k, POOLED)
            weight = tl.where(seen, weight, 0.0)
        d_score = weight * (tl.dot(do, tl.trans(v), input_precision="tf32x3") - delta[:, None])
        dq = tl.dot(d_score.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@triton.jit
def _backward_q(
    q_desc, k_desc, v_desc, key_start_ptr, doc_ptr, index_ptr, do_desc, lse_ptr, delta_ptr, dq_desc,
    n, n_q, n_k, n_pad, scale, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(0) % h_q, tl.program_id(0) // h_q
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = row + tl.arange(0, ROWS)
    first, last = _interval(doc_ptr, index_ptr, b.to(tl.int64), rows, n, n_q, WINDOW, POOLED, HAS_DOCS, HAS_INDEX)
    low, inner, outer, high = _key_tiles(first, last, rows < n_q, n_k, KEYS, POOLED)
    q = tl.reshape(q_desc.load([b, row, h * D]), [ROWS, D])
    do = tl.reshape(do_desc.load([b, row, h * D]), [ROWS, D])
    at = (b.to(tl.int64) * h_q + h) * n_pad + rows
    lse, delta = tl.load(lse_ptr + at), tl.load(delta_ptr + at)
    column = h // (h_q // h_kv) * D
    dq = tl.zeros([ROWS, D], tl.float32)
    if not POOLED:
        dq = _dq_tiles(
            dq, q, do, lse, delta, k_desc, v_desc, key_start_ptr, b, column, first, last, n_k, scale_log2,
            inner, outer - inner, 0, 0, D, KEYS, False, POOLED,
        )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, k_desc, v_desc, key_start_ptr, b, column, first, last, n_k, scale_log2,
        low, high - outer + inner - low, inner - low, outer - inner, D, KEYS, True, POOLED,
    )  # fmt: skip
    dq_desc.store([b, row, h * D], tl.reshape(dq * scale, [1, ROWS, D]).to(dq_desc.dtype))


@triton.jit
def _dkv_tiles(
    dk, dv, k, v, since, until, q_desc, do_desc, lse_desc, delta_desc, index_ptr, b, head, heads,
    start, count, turn, jump, n_q, scale_log2, h_q: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """For each head, row tiles start .. start + count, `jump` of them left out after `turn`: one loop for all heads,
    because a loop's pipeline fills and drains once."""
    for i in range(count * heads):
        h, j = head + i // count, i % count
        row = (start + j + tl.where(j < turn, 0, jump)) * ROWS
        q = tl.reshape(q_desc.load([b, row, h * D]), [ROWS, D])
        do = tl.reshape(do_desc.load([b, row, h * D]), [ROWS, D])
        lse = tl.reshape(lse_desc.load([b * h_q + h, row]), [ROWS])
        delta = tl.reshape(delta_desc.load([b * h_q + h, row]), [ROWS])
        score = tl.dot(k, tl.trans(q), input_precision="tf32x3")
        weight = tl.exp2(score * scale_log2 - lse[None, :])  # 0 for rows past the end: their lse is infinite
        if MASKED:
            t = row + tl.arange(0, ROWS)
            if HAS_INDEX:
                t = tl.load(index_ptr + t, mask=t < n_q, other=-1)
            weight = tl.where((t[None, :] >= since[:, None]) & (t[None, :] < until[:, None]), weight, 0.0)
        d_weight = tl.dot(v, tl.trans(do), input_precision="tf32x3")
        dv = tl.dot(weight.to(do.dtype), do, dv, input_precision="tf32x3")
        d_score = (weight * (d_weight - delta[None, :])).to(q.dtype)
        dk = tl.dot(d_score, q, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit
def _backward_kv(
    q_desc, k_desc, v_desc, key_start_ptr, doc_end_ptr, index_ptr, do_desc, lse_desc, delta_desc,
    dk_desc, dv_desc, batch, n, n_q, n_k, scale, scale_log2,
    h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, part of its query group, key tile); partial sums [SPLITS, B, Nk, Hkv, D]."""
    part, h, b = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS % h_kv, tl.program_id(0) // (SPLITS * h_kv)
    first_key = tl.program_id(1) * KEYS
    key = first_key + tl.arange(0, KEYS)
    start, real = key, key < n_k
    if POOLED:
        start = tl.load(key_start_ptr + b.to(tl.int64) * n_k + key, mask=real, other=-1)
        real = real & (start >= 0)
    huge: tl.constexpr = 1 << 30
    since, until = start, tl.zeros([KEYS], tl.int32) + n  # the positions that see a key
    if POOLED:
        since = start + POOLED - 1
    if HAS_DOCS:
        until = tl.load(doc_end_ptr + b.to(tl.int64) * n + start, mask=real, other=0)
    if WINDOW:
        until = tl.minimum(until, start + WINDOW)
    since, until = tl.where(real, since, huge), tl.where(real, until, 0)
    if HAS_INDEX:
        low, high = 0, tl.cdiv(n_q, ROWS)
        inner, outer = high, high
    else:
        low, high = tl.min(since, 0) // ROWS, tl.cdiv(tl.max(until, 0), ROWS)
        inner = tl.minimum(tl.maximum(tl.cdiv(tl.max(since, 0), ROWS), low), high)
        outer = tl.minimum(tl.maximum(tl.min(until, 0) // ROWS, inner), high)
    k = tl.reshape(k_desc.load([b, first_key, h * D]), [KEYS, D])
    v = tl.reshape(v_desc.load([b, first_key, h * D]), [KEYS, D])
    if D <= 64:  # computed, k stays in registers, as q does in triton_dual_backward.py; at 128 it would spill
        k += 0.0
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    heads: tl.constexpr = h_q // h_kv // SPLITS
    head = h * (h_q // h_kv) + part * heads
    if not HAS_INDEX:
        dk, dv = _dkv_tiles(
            dk, dv, k, v, since, until, q_desc, do_desc, lse_desc, delta_desc, index_ptr, b, head, heads,
            inner, outer - inner, 0, 0, n_q, scale_log2, h_q, D, ROWS, False, HAS_INDEX,
        )  # fmt: skip
    dk, dv = _dkv_tiles(
        dk, dv, k, v, since, until, q_desc, do_desc, lse_desc, delta_desc, index_ptr, b, head, heads,
        low, high - outer + inner - low, inner - low, outer - inner, n_q, scale_log2, h_q, D, ROWS, True, HAS_INDEX,
    )  # fmt: skip
    dk_desc.store([part * batch + b, first_key, h * D], tl.reshape(dk * scale, [1, KEYS, D]).to(dk_desc.dtype))
    dv_desc.store([part * batch + b, first_key, h * D], tl.reshape(dv, [1, KEYS, D]).to(dv_desc.dtype))


def document_ends(doc_starts: Tensor) -> Tensor:
    """int32 [B, N]: for each token, one past the last of its document."""
    n = doc_starts.shape[1]
    place = torch.arange(n, device=doc_starts.device, dtype=torch.int32)
    last = torch.ones_like(doc_starts, dtype=torch.bool)
    last[:, :-1] = doc_starts[:, 1:] != doc_starts[:, :-1]
    return torch.where(last, place + 1, n).flip(1).cummin(1).values.flip(1).contiguous()


def backward_q(q, k, v, lse, do, delta, scale: float, dense: Dense, config) -> Tensor:
    """lse and delta [B, Hq, Nq padded]."""
    batch, n_q, h_q, dim = q.shape
    dq = torch.empty_like(q)
    rows, keys, warps, stages = config.dense_dq
    _backward_q[(h_q * batch, triton.cdiv(n_q, rows))](
        tiles(q, rows), tiles(k, keys), tiles(v, keys), dense.key_start, dense.doc_starts, dense.query_index,
        tiles(do, rows), lse, delta, tiles(dq, rows), dense.n, n_q, k.shape[1], lse.shape[2], scale, scale * LOG2E,
        h_q, k.shape[2], dim, rows, keys, **dense.flags(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq


def by_head(delta: Tensor) -> Tensor:
    """[B, Nq, Hq] -> [B, Hq, Nq padded with zeros], as the forward pass lays its log-sum-exp out."""
    return F.pad(delta.transpose(1, 2), (0, -delta.shape[1] % PAD)).contiguous()


def group_splits(group: int, programs: int) -> int:
    """Into how many programs' shares a query group is cut: so many that the GPU is full and evenly loaded."""
    splits = 1
    while programs * splits < PROGRAMS and group % (2 * splits) == 0:
        splits *= 2
    return splits


def backward_kv(q, k, v, lse, do, delta, scale: float, dense: Dense, config) -> tuple[Tensor, Tensor]:
    """lse and delta [B, Hq, Nq padded]."""
    batch, n_q, h_q, dim = q.shape
    n_k, h_kv = k.shape[1:3]
    rows, keys, warps, stages = config.dense_dkv
    splits = group_splits(h_q // h_kv, h_kv * batch * triton.cdiv(n_k, keys))
    part = k.dtype if splits == 1 else torch.float32
    dk, dv = (torch.empty(splits, *k.shape, dtype=part, device=k.device) for _ in range(2))
    docs = dense.doc_starts
    ends = None if docs is None else remembered(docs, "ends", lambda: document_ends(docs))
    lse, delta = (TensorDescriptor(x, [batch * h_q, x.shape[2]], [x.shape[2], 1], [1, rows]) for x in (lse, delta))
    _backward_kv[(splits * h_kv * batch, triton.cdiv(n_k, keys))](
        tiles(q, rows), tiles(k, keys), tiles(v, keys), dense.key_start, ends, dense.query_index, tiles(do, rows),
        lse, delta, tiles(dk.flatten(0, 1), keys),
        tiles(dv.flatten(0, 1), keys), batch, dense.n, n_q, n_k, scale, scale * LOG2E,
        h_q, h_kv, dim, splits, rows, keys, **dense.flags(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return tuple(x[0] if splits == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))


def backward(q, k, v, o, lse, do, scale: float, dense: Dense, config, delta=None) -> tuple[Tensor, Tensor, Tensor]:
    """delta: fp32 [B, Nq, Hq], rowsum(do * o), when the caller has it."""
    if delta is None:
        delta = row_delta(o, do, config.gate_rows)
    delta = by_head(delta)
    dq = backward_q(q, k, v, lse, do, delta, scale, dense, config)
    return dq, *backward_kv(q, k, v, lse, do, delta, scale, dense, config)
