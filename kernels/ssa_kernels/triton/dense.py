"""Dense attention that knows documents, windows, query places and pooled keys: what is visible, and the forward pass.

What a row may see is an interval of positions, so key tiles outside every row's interval are never visited and tiles
inside all of them carry no mask. Tiles travel through tensor descriptors, which read zeros and write nothing past the
end. It refuses nothing: `triton_backend.py` has prepared the arguments (contiguous, head dimension a power of two from
16).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ssa_kernels.triton.routing import LOG2E, _places

PAD = 128  # row statistics are padded to a multiple of the largest row tile, so that no load needs a mask


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
def _interval(
    doc_ptr, index_ptr, b, rows, n, n_q, WINDOW: tl.constexpr, POOLED: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """First and last position each row sees (a pooled block is seen by its first); rows past the end see nothing."""
    t, first = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
    last = t
    if WINDOW:
        first = tl.maximum(first, t - WINDOW + 1)
    if POOLED:
        last = tl.where(rows < n_q, t + 1 - POOLED, -1)
    return first, last


@triton.jit
def _key_tiles(first, last, real, n_k, KEYS: tl.constexpr, POOLED: tl.constexpr):
    """Tiles [low, high) of which some row sees something, and [inner, outer) that every row sees whole."""
    huge: tl.constexpr = 2147483647
    low, high = tl.min(tl.where(real, first, huge), 0), tl.max(last, 0) + 1
    if POOLED:  # a slot's block begins inside the slot's own positions
        low, high = low // POOLED // KEYS, tl.cdiv(tl.minimum((high + POOLED - 1) // POOLED, n_k), KEYS)
        inner, outer = high, high
    else:
        inner = tl.cdiv(tl.max(tl.where(real, first, 0), 0), KEYS)
        outer = (tl.min(tl.where(real, last, huge - 1), 0) + 1) // KEYS
        low, high = low // KEYS, tl.cdiv(high, KEYS)
    inner = tl.minimum(tl.maximum(inner, low), high)
    return low, inner, tl.minimum(tl.maximum(outer, inner), high), high


@triton.jit
def _seen(first, last, key, key_start_ptr, b, n_k, POOLED: tl.constexpr):
    """[rows, keys] from first and last [rows, 1], key [1, keys]."""
    place = key
    if POOLED:
        place = tl.load(key_start_ptr + b.to(tl.int64) * n_k + key, mask=key < n_k, other=-1)
    return (place >= first) & (place <= last)


@triton.jit
def _forward_tiles(
    acc, top, total, q, k_desc, v_desc, key_start_ptr, b, column, first, last, n_k, scale_log2,
    start, count, turn, jump, D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Key tiles start .. start + count; `jump` tiles are left out after `turn` of them."""
    for i in range(count):
        key = (start + i + tl.where(i < turn, 0, jump)) * KEYS
        k = tl.reshape(k_desc.load([b, key, column]), [KEYS, D])
        v = tl.reshape(v_desc.load([b, key, column]), [KEYS, D])
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if MASKED:
            keys = key + tl.arange(0, KEYS)
            seen = _seen(first[:, None], last[:, None], keys[None, :], key_start_ptr, b, n_k, POOLED)
            score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale_log2)
        safe = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score * scale_log2 - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = higher
    return acc, top, total


@triton.jit
def _forward(
    q_desc, k_desc, v_desc, key_start_ptr, doc_ptr, index_ptr, o_desc, lse_ptr,
    n, n_q, n_k, n_pad, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOW: tl.constexpr, POOLED: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """One program per (head, row tile): heads run together to share keys in L2, the longest rows start first."""
    h, b = tl.program_id(0) % h_q, tl.program_id(0) // h_q
    row = (tl.num_programs(1) - 1 - tl.program_id(1)) * ROWS
    rows = row + tl.arange(0, ROWS)
    first, last = _interval(doc_ptr, index_ptr, b.to(tl.int64), rows, n, n_q, WINDOW, POOLED, HAS_DOCS, HAS_INDEX)
    low, inner, outer, high = _key_tiles(first, last, rows < n_q, n_k, KEYS, POOLED)
    q = tl.reshape(q_desc.load([b, row, h * D]), [ROWS, D])
    column = h // (h_q // h_kv) * D
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    if not POOLED:
        acc, top, total = _forward_tiles(
            acc, top, total, q, k_desc, v_desc, key_start_ptr, b, column, first, last, n_k, scale_log2,
            inner, outer - inner, 0, 0, D, KEYS, False, POOLED,
        )  # fmt: skip
    acc, top, total = _forward_tiles(
        acc, top, total, q, k_desc, v_desc, key_start_ptr, b, column, first, last, n_k, scale_log2,
        low, high - outer + inner - low, inner - low, outer - inner, D, KEYS, True, POOLED,
    )  # fmt: skip
    lse = tl.where(total > 0, top + tl.log2(total), float("inf"))
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    o_desc.store([b, row, h * D], tl.reshape(acc, [1, ROWS, D]).to(o_desc.dtype))
    tl.store(lse_ptr + (b.to(tl.int64) * h_q + h) * n_pad + rows, lse, mask=rows < n_pad)


def tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """[B, N, H, D] as tiles of `rows` tokens of one head; a row past N reads as zero and is not written."""
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    batch, n, heads, dim = x.shape
    return TensorDescriptor(x, [batch, n, heads * dim], [n * heads * dim, heads * dim, 1], [1, rows, dim])


def forward(q, k, v, scale: float, dense: Dense, config) -> tuple[Tensor, Tensor]:
    """o [B, Nq, Hq, D] and log2-sum-exp2 fp32 [B, Hq, Nq padded], infinite where a row sees nothing."""
    batch, n_q, h_q, dim = q.shape
    n_pad = triton.cdiv(n_q, PAD) * PAD
    o, lse = torch.empty_like(q), torch.empty(batch, h_q, n_pad, dtype=torch.float32, device=q.device)
    rows, keys, warps, stages = config.dense_forward
    _forward[(h_q * batch, n_pad // rows)](
        tiles(q, rows), tiles(k, keys), tiles(v, keys), dense.key_start, dense.doc_starts, dense.query_index,
        tiles(o, rows), lse, dense.n, n_q, k.shape[1], n_pad, scale * LOG2E,
        h_q, k.shape[2], dim, rows, keys, **dense.flags(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return o, lse
