"""Dense attention that knows documents, windows, query places and pooled keys: forward, dQ and dK/dV.

Key tiles wholly outside a query tile's documents, window or past are never visited, and tiles wholly inside carry no
mask. It refuses nothing: `triton_backend.py` has prepared the arguments (contiguous, head dimension a power of two
from 16).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import remembered
from .triton_gate import row_delta
from .triton_routing import LOG2E, _places


class Dense(NamedTuple):
    """One dense stream: key sequence `k`, `v` [B, Nk, Hkv, D] and what is visible.

    window: tokens, 0 = unlimited. pooled: block size when keys are pooled blocks (then `key_start` [B, Nk] holds
    their first positions, -1 = none), else 0. n: length of the token sequence (doc_starts' second size).
    """

    n: int
    window: int = 0
    pooled: int = 0
    key_start: Tensor | None = None
    doc_starts: Tensor | None = None
    query_index: Tensor | None = None

    def flags(self) -> dict:
        return {
            "WINDOW": self.window, "POOLED": self.pooled,
            "HAS_DOCS": self.doc_starts is not None, "HAS_INDEX": self.query_index is not None,
        }  # fmt: skip


@triton.jit
def _visible(key, key_start_ptr, b, n_k, t, s, WINDOW: tl.constexpr, POOLED: tl.constexpr):
    """[rows, keys]: t and s [rows, 1], key [1, keys]."""
    if POOLED:
        start = tl.load(key_start_ptr + b * n_k + key, mask=key < n_k, other=-1)
        return (start >= s) & (start + POOLED <= t + 1)
    seen = (key <= t) & (key >= s)
    if WINDOW:
        seen = seen & (key > t - WINDOW)
    return seen


@triton.jit
def _key_range(t, s, real, KEYS: tl.constexpr, WINDOW: tl.constexpr, POOLED: tl.constexpr):
    """Keys [low, high) any row may see, and [inner, outer) that every row sees; all but `high` multiples of KEYS."""
    huge: tl.constexpr = 2147483647
    low, high = tl.min(tl.where(real, s, huge), 0), tl.max(t, 0) + 1
    inner, outer = tl.max(tl.where(real, s, 0), 0), tl.min(tl.where(real, t, huge), 0) + 1
    if WINDOW:
        low = tl.maximum(low, tl.min(tl.where(real, t, huge), 0) - WINDOW + 1)
        inner = tl.maximum(inner, tl.max(t, 0) - WINDOW + 1)
    if POOLED:
        low, high = low // POOLED, tl.max(t, 0) // POOLED + 1
        inner, outer = high, high
    low = low // KEYS * KEYS
    inner = tl.minimum((inner + KEYS - 1) // KEYS * KEYS, high)
    outer = tl.maximum(outer // KEYS * KEYS, inner)
    return low, inner, tl.minimum(outer, tl.maximum(high, inner)), high


@triton.jit
def _forward_tiles(
    acc, top, total, q, k_ptr, v_ptr, key_start_ptr, b, base, low, high, t, s, n_k, scale_log2,
    stride: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, D)
    for first in range(low, high, KEYS):
        key = first + tl.arange(0, KEYS)
        k_at = base + key[None, :].to(tl.int64) * stride + dim[:, None]
        v_at = base + key[:, None].to(tl.int64) * stride + dim[None, :]
        if MASKED:
            k_t = tl.load(k_ptr + k_at, mask=(key < n_k)[None, :], other=0.0)
            v = tl.load(v_ptr + v_at, mask=(key < n_k)[:, None], other=0.0)
        else:
            k_t, v = tl.load(k_ptr + k_at), tl.load(v_ptr + v_at)
        score = tl.dot(q, k_t, input_precision="tf32x3") * scale_log2
        if MASKED:
            seen = _visible(key[None, :], key_start_ptr, b, n_k, t[:, None], s[:, None], WINDOW, POOLED)
            score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = higher
    return acc, top, total


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, key_start_ptr, doc_ptr, index_ptr, o_ptr, lse_ptr,
    n, n_q, n_k, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)  # the longest rows start first
    real = rows < n_q
    t, s = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
    dim = tl.arange(0, D)
    at = ((b * n_q + rows)[:, None] * h_q + h) * D + dim[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
    base = (b * n_k * h_kv + h // (h_q // h_kv)) * D
    low, inner, outer, high = _key_range(t, s, real, KEYS, WINDOW, POOLED)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    if HAS_DOCS or HAS_INDEX or WINDOW or POOLED:  # otherwise nothing lies before the inner part
        acc, top, total = _forward_tiles(
            acc, top, total, q, k_ptr, v_ptr, key_start_ptr, b, base, low, inner, t, s, n_k, scale_log2,
            h_kv * D, D, KEYS, True, WINDOW, POOLED,
        )  # fmt: skip
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, key_start_ptr, b, base, inner, outer, t, s, n_k, scale_log2,
        h_kv * D, D, KEYS, False, WINDOW, POOLED,
    )  # fmt: skip
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_ptr, v_ptr, key_start_ptr, b, base, outer, high, t, s, n_k, scale_log2,
        h_kv * D, D, KEYS, True, WINDOW, POOLED,
    )  # fmt: skip
    lse = tl.where(total > 0, top + tl.log2(total), float("inf"))
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o_ptr + at, acc.to(o_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(lse_ptr + (b * n_q + rows) * h_q + h, lse, mask=real)


@triton.jit
def _dq_tiles(
    dq, q, do, lse, delta, k_ptr, v_ptr, key_start_ptr, b, base, low, high, t, s, n_k, scale_log2,
    stride: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, D)
    for first in range(low, high, KEYS):
        key = first + tl.arange(0, KEYS)
        at = base + key[:, None].to(tl.int64) * stride + dim[None, :]
        at_t = base + key[None, :].to(tl.int64) * stride + dim[:, None]
        if MASKED:
            k = tl.load(k_ptr + at, mask=(key < n_k)[:, None], other=0.0)
            v_t = tl.load(v_ptr + at_t, mask=(key < n_k)[None, :], other=0.0)
        else:
            k, v_t = tl.load(k_ptr + at), tl.load(v_ptr + at_t)
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2
        weight = tl.exp2(score - lse[:, None])
        if MASKED:
            seen = _visible(key[None, :], key_start_ptr, b, n_k, t[:, None], s[:, None], WINDOW, POOLED)
            weight = tl.where(seen, weight, 0.0)
        d_score = weight * (tl.dot(do, v_t, input_precision="tf32x3") - delta[:, None])
        dq = tl.dot(d_score.to(k.dtype), k, dq, input_precision="tf32x3")
    return dq


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, key_start_ptr, doc_ptr, index_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    n, n_q, n_k, scale, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    real = rows < n_q
    t, s = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
    dim = tl.arange(0, D)
    at = ((b * n_q + rows)[:, None] * h_q + h) * D + dim[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
    do = tl.load(do_ptr + at, mask=real[:, None], other=0.0)
    lse = tl.load(lse_ptr + (b * n_q + rows) * h_q + h, mask=real, other=float("inf"))
    delta = tl.load(delta_ptr + (b * n_q + rows) * h_q + h, mask=real, other=0.0)
    base = (b * n_k * h_kv + h // (h_q // h_kv)) * D
    low, inner, outer, high = _key_range(t, s, real, KEYS, WINDOW, POOLED)
    dq = tl.zeros([ROWS, D], tl.float32)
    if HAS_DOCS or HAS_INDEX or WINDOW or POOLED:
        dq = _dq_tiles(
            dq, q, do, lse, delta, k_ptr, v_ptr, key_start_ptr, b, base, low, inner, t, s, n_k, scale_log2,
            h_kv * D, D, KEYS, True, WINDOW, POOLED,
        )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, k_ptr, v_ptr, key_start_ptr, b, base, inner, outer, t, s, n_k, scale_log2,
        h_kv * D, D, KEYS, False, WINDOW, POOLED,
    )  # fmt: skip
    dq = _dq_tiles(
        dq, q, do, lse, delta, k_ptr, v_ptr, key_start_ptr, b, base, outer, high, t, s, n_k, scale_log2,
        h_kv * D, D, KEYS, True, WINDOW, POOLED,
    )  # fmt: skip
    tl.store(dq_ptr + at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _dkv_tiles(
    dk, dv, k, v, key, start, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, index_ptr, key_start_ptr, b, h, low, high,
    n, n_q, n_k, scale_log2, h_q: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, D)
    for first in range(low, high, ROWS):
        rows = first + tl.arange(0, ROWS)
        real = rows < n_q
        at = ((b * n_q + rows)[:, None] * h_q + h) * D + dim[None, :]
        if MASKED:
            q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
            do = tl.load(do_ptr + at, mask=real[:, None], other=0.0)
            lse = tl.load(lse_ptr + (b * n_q + rows) * h_q + h, mask=real, other=float("inf"))
            delta = tl.load(delta_ptr + (b * n_q + rows) * h_q + h, mask=real, other=0.0)
        else:
            q, do = tl.load(q_ptr + at), tl.load(do_ptr + at)
            lse = tl.load(lse_ptr + (b * n_q + rows) * h_q + h)
            delta = tl.load(delta_ptr + (b * n_q + rows) * h_q + h)
        score = tl.dot(k, tl.trans(q), input_precision="tf32x3") * scale_log2
        weight = tl.exp2(score - lse[None, :])
        if MASKED:
            t, s = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
            seen = _visible(key[:, None], key_start_ptr, b, n_k, t[None, :], s[None, :], WINDOW, POOLED)
            weight = tl.where(seen & real[None, :], weight, 0.0)
        dv = tl.dot(weight.to(do.dtype), do, dv, input_precision="tf32x3")
        d_score = weight * (tl.dot(v, tl.trans(do), input_precision="tf32x3") - delta[None, :])
        dk = tl.dot(d_score.to(q.dtype), q, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, key_start_ptr, doc_ptr, doc_end_ptr, index_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    n, n_q, n_k, scale, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """One program per (key tile, KV head, part of its query group); partial sums [SPLITS, B, Nk, Hkv, D]."""
    h, part, b = tl.program_id(1) // SPLITS, tl.program_id(1) % SPLITS, tl.program_id(2).to(tl.int64)
    key = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    dim = tl.arange(0, D)
    real = key < n_k
    at = ((b * n_k + key)[:, None] * h_kv + h) * D + dim[None, :]
    k = tl.load(k_ptr + at, mask=real[:, None], other=0.0)
    v = tl.load(v_ptr + at, mask=real[:, None], other=0.0)
    dk = tl.zeros([KEYS, D], tl.float32)
    dv = tl.zeros([KEYS, D], tl.float32)
    start = key
    if POOLED:
        start = tl.load(key_start_ptr + b * n_k + key, mask=real, other=-1)
        real = real & (start >= 0)
    low = tl.min(tl.where(real, start, n), 0)
    high = tl.max(tl.where(real, start, -1), 0) + 1  # one past the tile's last position
    edge = (high + ROWS - 1) // ROWS * ROWS  # from here on causality hides nothing
    end = n_q
    if HAS_DOCS:
        end = tl.max(tl.load(doc_end_ptr + b * n + start, mask=real, other=0), 0)
    if WINDOW:
        end = tl.minimum(end, high - 1 + WINDOW)
    if HAS_INDEX:
        low, end = 0, n_q
    low = low // ROWS * ROWS
    whole = end // ROWS * ROWS
    if HAS_DOCS or HAS_INDEX or WINDOW or POOLED:
        edge, whole = end, end
    edge = tl.minimum(edge, end)
    whole = tl.maximum(whole, edge)
    group: tl.constexpr = h_q // h_kv
    for i in range(group // SPLITS):
        head = h * group + part * (group // SPLITS) + i
        dk, dv = _dkv_tiles(
            dk, dv, k, v, key, start, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, index_ptr, key_start_ptr, b, head,
            low, edge, n, n_q, n_k, scale_log2, h_q, D, ROWS, True, WINDOW, POOLED, HAS_DOCS, HAS_INDEX,
        )  # fmt: skip
        if not (HAS_DOCS or HAS_INDEX or WINDOW or POOLED):
            dk, dv = _dkv_tiles(
                dk, dv, k, v, key, start, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, index_ptr, key_start_ptr, b, head,
                edge, whole, n, n_q, n_k, scale_log2, h_q, D, ROWS, False, WINDOW, POOLED, HAS_DOCS, HAS_INDEX,
            )  # fmt: skip
            dk, dv = _dkv_tiles(
                dk, dv, k, v, key, start, q_ptr, do_ptr, lse_ptr, delta_ptr, doc_ptr, index_ptr, key_start_ptr, b, head,
                whole, end, n, n_q, n_k, scale_log2, h_q, D, ROWS, True, WINDOW, POOLED, HAS_DOCS, HAS_INDEX,
            )  # fmt: skip
    out = part * (tl.num_programs(2).to(tl.int64) * n_k * h_kv * D) + at
    tl.store(dk_ptr + out, (dk * scale).to(dk_ptr.dtype.element_ty), mask=(key < n_k)[:, None])
    tl.store(dv_ptr + out, dv.to(dv_ptr.dtype.element_ty), mask=(key < n_k)[:, None])


def document_ends(doc_starts: Tensor) -> Tensor:
    """int32 [B, N]: for each token, one past the last of its document."""
    n = doc_starts.shape[1]
    place = torch.arange(n, device=doc_starts.device, dtype=torch.int32)
    last = torch.ones_like(doc_starts, dtype=torch.bool)
    last[:, :-1] = doc_starts[:, 1:] != doc_starts[:, :-1]
    return torch.where(last, place + 1, n).flip(1).cummin(1).values.flip(1).contiguous()


def forward(q, k, v, scale: float, dense: Dense, config) -> tuple[Tensor, Tensor]:
    """o [B, Nq, Hq, D] and log2-sum-exp2 fp32 [B, Nq, Hq]."""
    batch, n_q, h_q, dim = q.shape
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rows, keys, warps, stages = config.dense_forward
    _forward[(triton.cdiv(n_q, rows), h_q, batch)](
        q, k, v, dense.key_start, dense.doc_starts, dense.query_index, o, lse, dense.n, n_q, k.shape[1], scale * LOG2E,
        h_q, k.shape[2], dim, rows, keys, **dense.flags(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o, lse


def backward_q(q, k, v, lse, do, delta, scale: float, dense: Dense, config) -> Tensor:
    batch, n_q, h_q, dim = q.shape
    dq = torch.empty_like(q)
    rows, keys, warps, stages = config.dense_dq
    _backward_q[(triton.cdiv(n_q, rows), h_q, batch)](
        q, k, v, dense.key_start, dense.doc_starts, dense.query_index, do, lse, delta, dq, dense.n, n_q, k.shape[1],
        scale, scale * LOG2E, h_q, k.shape[2], dim, rows, keys, **dense.flags(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq


def backward_kv(q, k, v, lse, do, delta, scale: float, dense: Dense, config) -> tuple[Tensor, Tensor]:
    batch, n_q, h_q, dim = q.shape
    n_k, h_kv = k.shape[1:3]
    group, splits = h_q // h_kv, 1
    while splits < 4 and group % (2 * splits) == 0:
        splits *= 2
    part = k.dtype if splits == 1 else torch.float32
    dk, dv = (torch.empty(splits, *k.shape, dtype=part, device=k.device) for _ in range(2))
    docs = dense.doc_starts
    ends = None if docs is None else remembered(docs, "ends", lambda: document_ends(docs))
    rows, keys, warps, stages = config.dense_dkv
    _backward_kv[(triton.cdiv(n_k, keys), h_kv * splits, batch)](
        q, k, v, dense.key_start, dense.doc_starts, ends, dense.query_index, do, lse, delta, dk, dv, dense.n, n_q, n_k,
        scale, scale * LOG2E, h_q, h_kv, dim, splits, rows, keys, **dense.flags(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return tuple(x[0] if splits == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))


def backward(q, k, v, o, lse, do, scale: float, dense: Dense, config, delta=None) -> tuple[Tensor, Tensor, Tensor]:
    if delta is None:
        delta = row_delta(o, do, config.gate_rows)
    dq = backward_q(q, k, v, lse, do, delta, scale, dense, config)
    return dq, *backward_kv(q, k, v, lse, do, delta, scale, dense, config)
