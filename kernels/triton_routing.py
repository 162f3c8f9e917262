"""Routing kernels: pooled keys, the softmax statistics of their scores, and exact streaming top-k.

Two passes over pooled keys (the group's score is a sum of softmaxes, so the normalisers come first); a running list
of the best blocks per token is merged with each tile's best, and no `[N, N / b]` score tensor ever exists.
It refuses nothing: `triton_backend.py` has prepared the arguments (contiguous, head dimension a power of two from 16).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import slot_count
from .spec import BlockSpec

LOG2E = 1.4426950408889634


@triton.jit
def _pool(
    k_ptr, doc_ptr, start_ptr, high_ptr, low_ptr,
    n, slots, h_kv: tl.constexpr, SIZE: tl.constexpr, SIZE_P: tl.constexpr, D: tl.constexpr,
    HAS_DOCS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program per (slot, batch row): where its complete block begins, and the block's mean key per KV head."""
    slot, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, SIZE_P)
    place = slot * SIZE + row
    if HAS_DOCS:
        inside = (row < SIZE) & (place + SIZE <= n)
        doc = tl.load(doc_ptr + b * n + place, mask=inside, other=-1)
        last = tl.load(doc_ptr + b * n + place + SIZE - 1, mask=inside, other=-2)
        begins = inside & (doc == last) & ((place - doc) % SIZE == 0)
        start = tl.max(tl.where(begins, place, -1), 0)
    else:
        start = tl.where(slot * SIZE + SIZE <= n, slot * SIZE, -1)
    tl.store(start_ptr + b * slots + slot, start)
    dim = tl.arange(0, D)
    keep = (row < SIZE) & (start >= 0)
    for h in range(h_kv):
        at = ((b * n + start + row)[:, None] * h_kv + h) * D + dim[None, :]
        mean = tl.sum(tl.load(k_ptr + at, mask=keep[:, None], other=0.0).to(tl.float32), 0) / SIZE
        out = ((b * h_kv + h) * slots + slot) * D + dim
        high = mean.to(high_ptr.dtype.element_ty)
        tl.store(high_ptr + out, high)
        if SPLIT:  # what rounding to half precision lost, as a second half-precision number
            tl.store(low_ptr + out, (mean - high.to(tl.float32)).to(high_ptr.dtype.element_ty))


@triton.jit
def _pooled_scores(q, high_ptr, low_ptr, base, slot, slots, scale_log2, D: tl.constexpr, SPLIT: tl.constexpr):
    """Scores [rows, tile] in log2 units; the low half restores the precision that selection needs."""
    at = base + slot[None, :].to(tl.int64) * D + tl.arange(0, D)[:, None]
    here = (slot < slots)[None, :]
    score = tl.dot(q, tl.load(high_ptr + at, mask=here, other=0.0), input_precision="tf32x3")
    if SPLIT:
        score = tl.dot(q, tl.load(low_ptr + at, mask=here, other=0.0), score)
    return score * scale_log2


@triton.jit
def _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr):
    """Position and document start of each query row; rows past the end get position -1 and see nothing."""
    real = rows < n_q
    if HAS_INDEX:
        t = tl.load(index_ptr + rows, mask=real, other=-1)
    else:
        t = tl.where(real, rows, -1)
    if HAS_DOCS:
        s = tl.load(doc_ptr + b * n + t, mask=real, other=0)
    else:
        s = t * 0
    return t, s


@triton.jit
def _first_slot(s, real, SIZE: tl.constexpr, TILE: tl.constexpr):
    return tl.min(tl.where(real, s, 2147483647), 0) // SIZE // TILE * TILE


@triton.jit
def _statistics(
    q_ptr, high_ptr, low_ptr, start_ptr, doc_ptr, index_ptr, lse_ptr,
    n, n_q, slots, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp2 of each row's scores over the blocks complete at it, fp32 [B, Nq, Hq]; +inf where there is none."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)  # the longest rows start first
    t, s = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
    at = ((b * n_q + rows)[:, None] * h_q + h) * D + tl.arange(0, D)[None, :]
    q = tl.load(q_ptr + at, mask=(rows < n_q)[:, None], other=0.0)
    base = (b * h_kv + h // (h_q // h_kv)) * slots * D
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if tl.max((t - s) // SIZE, 0) >= COUNT:  # otherwise every earlier block is selected and no score is needed
        for first in range(_first_slot(s, rows < n_q, SIZE, TILE), tl.max(t, 0) // SIZE + 1, TILE):
            slot = first + tl.arange(0, TILE)
            start = tl.load(start_ptr + b * slots + slot, mask=slot < slots, other=-1)
            seen = (start[None, :] >= s[:, None]) & (start[None, :] + SIZE <= t[:, None] + 1)
            score = _pooled_scores(q, high_ptr, low_ptr, base, slot, slots, scale_log2, D, SPLIT)
            score = tl.where(seen, score, -float("inf"))
            higher = tl.maximum(top, tl.max(score, 1))
            safe = tl.where(higher == -float("inf"), 0.0, higher)
            total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(score - safe[:, None]), 1)
            top = higher
    lse = tl.where(total > 0, top + tl.log2(total), float("inf"))
    tl.store(lse_ptr + (b * n_q + rows) * h_q + h, lse, mask=rows < n_q)


@triton.jit
def _merge(best, key, ROWS: tl.constexpr, KEEP: tl.constexpr):
    """The KEEP largest of a running list and a tile's keys; each row stays in descending order."""
    both = tl.reshape(tl.join(best, tl.topk(key, KEEP)), [ROWS, 2 * KEEP])
    return tl.topk(both, KEEP)


@triton.jit
def _select(
    q_ptr, high_ptr, low_ptr, start_ptr, doc_ptr, index_ptr, lse_ptr, out_ptr,
    n, n_q, slots, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, KEEP: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr, SPLIT: tl.constexpr, AUTHORS: tl.constexpr,
):  # fmt: skip
    """Group scores and the running best blocks of ROWS tokens of one KV head; writes the selection."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    real = rows < n_q
    t, s = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
    own = (t - s) // SIZE
    group: tl.constexpr = h_q // h_kv
    base = (b * h_kv + h) * slots * D
    best = tl.full([ROWS, KEEP], -1, tl.int64)
    early = tl.full([ROWS, KEEP], -1, tl.int64)  # authors' rule only: blocks before the current chunk of 16
    scored = tl.max(own, 0) >= COUNT
    if scored:
        for first in range(_first_slot(s, real, SIZE, TILE), tl.max(t, 0) // SIZE + 1, TILE):
            slot = first + tl.arange(0, TILE)
            start = tl.load(start_ptr + b * slots + slot, mask=slot < slots, other=-1)
            seen = (start[None, :] >= s[:, None]) & (start[None, :] < (s + own * SIZE)[:, None])
            total = tl.zeros([ROWS, TILE], tl.float32)
            for i in range(group):
                head = h * group + i
                at = ((b * n_q + rows)[:, None] * h_q + head) * D + tl.arange(0, D)[None, :]
                q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
                lse = tl.load(lse_ptr + (b * n_q + rows) * h_q + head, mask=real, other=float("inf"))
                score = _pooled_scores(q, high_ptr, low_ptr, base, slot, slots, scale_log2, D, SPLIT)
                total += tl.exp2(tl.minimum(score - lse[:, None], 0.0))
            # Scores are >= 0, so their bits order as integers; the low word makes keys distinct, lower slots larger.
            key = (total.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - slot)[None, :].to(tl.int64)
            key = tl.where(seen, key, -1)
            if AUTHORS:
                edge = (own // 16 * 16)[:, None]
                before = (slot[None, :] - (s // SIZE)[:, None]) < edge
                early = _merge(early, tl.where(before, key, -1), ROWS, KEEP)
                key = tl.where(before, -1, key)
            best = _merge(best, key, ROWS, KEEP)
    rank = tl.arange(0, KEEP)[None, :]
    huge: tl.constexpr = 0x7FFFFFFF
    slot = huge - (best & huge).to(tl.int32)
    block = tl.where((best >= 0) & (rank < COUNT - 1), slot - (s // SIZE)[:, None], huge)
    if AUTHORS:
        edge = (own // 16 * 16)[:, None]
        old = huge - (early & huge).to(tl.int32)
        old = tl.where((early >= 0) & (rank < 8), old - (s // SIZE)[:, None], huge)
        block = tl.where((edge > 0) & (rank >= 7), huge, block)
        # 7 of the current chunk and 8 earlier ones fit one list: the best early ones go where the chunk has none.
        block = tl.sort(tl.reshape(tl.join(block, old), [ROWS, 2 * KEEP]))
        column = tl.arange(0, 2 * KEEP)[None, :]
    else:
        block = tl.sort(block)
        column = rank
    if not scored:
        block = tl.where(column < own[:, None], column + tl.zeros_like(block), huge)
    place = ((b * n_q + rows)[:, None] * h_kv + h) * COUNT
    block = tl.where(block == huge, -1, block)
    tl.store(out_ptr + place + 1 + column, block, mask=real[:, None] & (column < COUNT - 1))
    zero = tl.zeros([ROWS, 1], tl.int32)
    tl.store(out_ptr + place + zero, own[:, None], mask=real[:, None])


def pool_keys(k_bnhd: Tensor, block_size: int, doc_starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """First positions int32 [B, slots] (-1 = none), and mean keys [B, Hkv, slots, D] as (high, low) halves.

    fp32 keys have no low half.
    """
    batch, n, heads, dim = k_bnhd.shape
    slots = slot_count(n, block_size)
    start = torch.empty(batch, slots, dtype=torch.int32, device=k_bnhd.device)
    high = torch.empty(batch, heads, slots, dim, dtype=k_bnhd.dtype, device=k_bnhd.device)
    split = k_bnhd.dtype != torch.float32
    low = torch.empty_like(high) if split else None
    _pool[(slots, batch)](
        k_bnhd, doc_starts, start, high, low, n, slots, heads, block_size,
        triton.next_power_of_2(block_size), dim, HAS_DOCS=doc_starts is not None, SPLIT=split, num_warps=1,
    )  # fmt: skip
    return start, high, low


def select_blocks(
    q: Tensor, k: Tensor, spec: BlockSpec, scale: float, doc_starts: Tensor | None, query_index: Tensor | None, config
) -> Tensor:
    """int32 [B, Nq, Hkv, block_count]; see `kernels.api.select_blocks`. `config`: rows, tile, warps of each pass."""
    batch, n_q, h_q, dim = q.shape
    n, h_kv = k.shape[1:3]
    out = torch.empty(batch, n_q, h_kv, spec.block_count, dtype=torch.int32, device=q.device)
    start, high, low = pool_keys(k, spec.block_size, doc_starts)
    slots = start.shape[1]
    lse = torch.empty(batch, n_q, h_q, dtype=torch.float32, device=q.device)
    flags = {"HAS_DOCS": doc_starts is not None, "HAS_INDEX": query_index is not None, "SPLIT": low is not None}
    sizes = (n, n_q, slots, scale * LOG2E, h_q, h_kv, spec.block_size, spec.block_count, dim)
    keep = max(2, triton.next_power_of_2(max(1, spec.block_count - 1)))
    tile = max(config.select_tile, keep)
    rows = max(16, min(config.select_rows, 4096 // tile))
    _statistics[(triton.cdiv(n_q, config.stat_rows), h_q, batch)](
        q, high, low, start, doc_starts, query_index, lse, *sizes,
        config.stat_rows, config.stat_tile, **flags, num_warps=config.stat_warps,
    )  # fmt: skip
    _select[(triton.cdiv(n_q, rows), h_kv, batch)](
        q, high, low, start, doc_starts, query_index, lse, out, *sizes,
        rows, tile, keep, **flags, AUTHORS=spec.topk == "authors", num_warps=config.select_warps,
    )  # fmt: skip
    return out
