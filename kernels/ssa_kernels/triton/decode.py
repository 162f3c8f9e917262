"""Sparse decode: scores of all complete blocks, exact top-k, and attention over the selected blocks, for few queries.

A query reads every pooled key once and `block_count` blocks. Up to ONE_PROGRAM blocks a single program does all of it;
above, one launch scores spans of blocks, one turns a span's scores into its best blocks (the group's score needs the
normaliser of all spans), one merges them and attends. Launches are sized by the cache's capacity and leave early by
the lengths on the device, so a CUDA graph can hold them. It refuses nothing: `inference.py` has seen the arguments.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_kernels.triton.cache_append import cache_rows
from ssa_kernels.triton.routing import LOG2E

ONE_PROGRAM = 512  # blocks
MOST_BLOCKS = 65  # a larger budget is selected by PyTorch and attended by splits (triton_split.py)


class Tiles(NamedTuple):
    """Checked-in choices of one head dimension, measured on an H100 (docs/performance.md); never tuned in a run."""

    pooled: int = 128  # pooled keys of a step
    keys: int = 128  # keys of a step
    whole: tuple[int, int] = (4, 2)  # warps, stages
    score: tuple[int, int] = (4, 3)
    choose: int = 1  # warps
    finish: tuple[int, int] = (4, 2)


TILES = {64: Tiles(), 128: Tiles(pooled=64, keys=64)}
GENERAL = Tiles(pooled=32, keys=32)  # fp32 and other sizes


def tiles_of(q: Tensor) -> Tiles:
    return TILES.get(q.shape[3], GENERAL) if q.element_size() == 2 else GENERAL


@triton.jit
def query_place(length_ptr, tokens):
    """Which query row this program serves (int64), its sequence (int64) and its place there, negative if none."""
    z = tl.program_id(2)
    b = z // tokens
    return z.to(tl.int64), b.to(tl.int64), tl.load(length_ptr + b) - tokens + z % tokens


@triton.jit
def load_queries(q_ptr, first_head, GROUP: tl.constexpr, GROUP_P: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr):
    head, dim = tl.arange(0, GROUP_P)[:, None], tl.arange(0, D)[None, :]
    return tl.load(q_ptr + (first_head + head) * DIM + dim, mask=(head < GROUP) & (dim < DIM), other=0.0)


@triton.jit
def _score_span(
    q, pooled_ptr, table_ptr, score_ptr, b, h, first_head, begin, end, slots, width, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    PER_PAGE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the heads' scores (log2 units) of blocks begin..end; returns their log2-sum-exp2 [GROUP_P]."""
    HALVES: tl.constexpr = 2 if SPLIT else 1
    head, dim = tl.arange(0, GROUP_P), tl.arange(0, D)
    top = tl.full([GROUP_P], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    for first in tl.range(begin, end, TILE, num_stages=STAGES):
        j = first + tl.arange(0, TILE)
        seen = j < end
        row = cache_rows(table_ptr, b, j, seen, slots, width, PER_PAGE)
        at = pooled_ptr + ((row * H + h) * HALVES * DIM)[None, :] + dim[:, None]
        keep = seen[None, :] & (dim < DIM)[:, None]
        score = tl.dot(q, tl.load(at, mask=keep, other=0.0), input_precision="tf32x3")
        if SPLIT:  # the low halves
            score = tl.dot(q, tl.load(at + DIM, mask=keep, other=0.0), score)
        score = tl.where(seen[None, :], score * scale_log2, -float("inf"))
        tl.store(
            score_ptr + (first_head + head)[:, None] * slots + j[None, :], score,
            mask=(head < GROUP)[:, None] & seen[None, :],
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(score - higher[:, None]), 1)
        top = higher
    return top + tl.log2(total)


@triton.jit
def _group_scores(
    score_ptr, lse, first_head, begin, own, slots,
    GROUP: tl.constexpr, GROUP_R: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """The group's scores of SPAN blocks as int32 [SPAN], whose order is the scores' own; -1 for what is no candidate."""
    head, j = tl.arange(0, GROUP_R), begin + tl.arange(0, SPAN)
    at = (first_head + head)[:, None] * slots + j[None, :]
    score = tl.load(score_ptr + at, mask=(head < GROUP)[:, None] & (j < own)[None, :], other=-float("inf"))
    total = tl.sum(tl.exp2(score - lse[:, None]), 0)
    return tl.where(j < own, total.to(tl.int32, bitcast=True), -1)


@triton.jit
def _take(bits, K: tl.constexpr):
    """Which are the K largest (all, if fewer than K are not negative), ties to the first; their ranks by position.

    The K-th largest is found a bit at a time: 31 counts cost a fifth of the instructions of a sort.
    """
    least = 0
    for i in range(31):
        higher = least | (1 << (30 - i))
        least = tl.where(tl.sum((bits >= higher).to(tl.int32), 0) >= K, higher, least)
    above = bits > least
    tied = bits == least
    spare = K - tl.sum(above.to(tl.int32), 0)
    chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= spare))
    return chosen, tl.cumsum(chosen.to(tl.int32), 0) - 1


@triton.jit
def _write_blocks(blocks_ptr, bits, block, own, scored, COUNT: tl.constexpr, COUNT_P: tl.constexpr):
    """The selection of one query and KV head from its candidates in ascending order: own block, the chosen, then -1."""
    if scored:
        chosen, rank = _take(bits, COUNT - 1)
        tl.store(blocks_ptr + 1 + rank, block, mask=chosen)
    else:  # every earlier block fits
        column = tl.arange(0, COUNT_P)
        tl.store(blocks_ptr + 1 + column, tl.where(column < own, column, -1), mask=column < COUNT - 1)
    tl.store(blocks_ptr, own)
    tl.debug_barrier()  # the whole program reads them next


@triton.jit
def attend(
    q, key_ptr, value_ptr, table_ptr, blocks_ptr, b, h, t, begin, end, capacity, width, scale_log2,
    H: tl.constexpr, GROUP_P: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    KEYS: tl.constexpr, LISTED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Softmax attention of one KV head's queries: over places begin..end, or over those of the listed blocks.

    Returns acc [GROUP_P, D], normalised, and log2-sum-exp2 [GROUP_P]: zeros and -inf where nothing is seen.
    """
    dim = tl.arange(0, D)
    top = tl.full([GROUP_P], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    acc = tl.zeros([GROUP_P, D], tl.float32)
    for first in tl.range(begin, end, KEYS, num_stages=STAGES):
        place = first + tl.arange(0, KEYS)
        seen = place < end
        if LISTED:
            block = tl.load(blocks_ptr + place // SIZE, mask=seen, other=-1)
            place = block * SIZE + place % SIZE
            seen = (block >= 0) & (place <= t)
        at = (cache_rows(table_ptr, b, place, seen, capacity, width, PAGE) * H + h) * DIM
        k_t = tl.load(key_ptr + at[None, :] + dim[:, None], mask=seen[None, :] & (dim < DIM)[:, None], other=0.0)
        v = tl.load(value_ptr + at[:, None] + dim[None, :], mask=seen[:, None] & (dim < DIM)[None, :], other=0.0)
        score = tl.dot(q, k_t, input_precision="tf32x3") * scale_log2
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = higher
    safe_total = tl.where(total > 0, total, 1.0)
    return acc / safe_total[:, None], top + tl.log2(safe_total)


@triton.jit
def store_heads(out_ptr, acc, first_head, GROUP: tl.constexpr, GROUP_P: tl.constexpr, DIM: tl.constexpr,
                D: tl.constexpr):  # fmt: skip
    head, dim = tl.arange(0, GROUP_P)[:, None], tl.arange(0, D)[None, :]
    at = out_ptr + (first_head + head) * DIM + dim
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=(head < GROUP) & (dim < DIM))


@triton.jit
def _score(
    q_ptr, pooled_ptr, length_ptr, table_ptr, score_ptr, lse_ptr, tokens, slots, width, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, COUNT: tl.constexpr, PER_PAGE: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Scores of one span of blocks and their log2-sum-exp2, fp32 [rows, Hq, spans]."""
    h, span = tl.program_id(0), tl.program_id(1)
    z, b, t = query_place(length_ptr, tokens)
    complete = (t + 1) // SIZE
    begin = span * SPAN
    if (t // SIZE >= COUNT) & (begin < complete):
        first_head = (z * H + h) * GROUP
        q = load_queries(q_ptr, first_head, GROUP, GROUP_P, DIM, D)
        lse = _score_span(
            q, pooled_ptr, table_ptr, score_ptr, b, h, first_head, begin, tl.minimum(complete, begin + SPAN), slots,
            width, scale_log2, H, GROUP, GROUP_P, DIM, D, PER_PAGE, TILE, SPLIT, STAGES,
        )  # fmt: skip
        head = tl.arange(0, GROUP_P)
        tl.store(lse_ptr + (first_head + head) * tl.num_programs(1) + span, lse, mask=head < GROUP)


@triton.jit
def _choose(
    score_ptr, lse_ptr, length_ptr, best_ptr, tokens, slots,
    H: tl.constexpr, GROUP: tl.constexpr, GROUP_R: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    COUNT_P: tl.constexpr, SPAN: tl.constexpr, SPANS_P: tl.constexpr,
):  # fmt: skip
    """The best candidates of one span, ascending: int64 (score, block) [rows, Hkv, spans, COUNT - 1], -1 for none."""
    h, span, spans = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    z, _, t = query_place(length_ptr, tokens)
    own, begin = t // SIZE, span * SPAN
    if (own >= COUNT) & (begin < own):
        first_head = (z * H + h) * GROUP
        head, other = tl.arange(0, GROUP_R)[:, None], tl.arange(0, SPANS_P)[None, :]
        written = (other * SPAN < (t + 1) // SIZE) & (head < GROUP)
        parts = tl.load(lse_ptr + (first_head + head) * spans + other, mask=written, other=-float("inf"))
        top = tl.max(parts, 1)
        top = tl.where(top == -float("inf"), 0.0, top)  # the heads that pad the group
        lse = top + tl.log2(tl.sum(tl.exp2(parts - top[:, None]), 1))
        lse = tl.where(tl.arange(0, GROUP_R) < GROUP, lse, 0.0)
        bits = _group_scores(score_ptr, lse, first_head, begin, own, slots, GROUP, GROUP_R, SPAN)
        chosen, rank = _take(bits, COUNT - 1)
        key = (bits.to(tl.int64) << 32) | (begin + tl.arange(0, SPAN)).to(tl.int64)
        best_ptr += ((z * H + h) * spans + span) * (COUNT - 1)
        tl.store(best_ptr + rank, key, mask=chosen)
        column = tl.arange(0, COUNT_P)
        tl.store(best_ptr + column, -1, mask=(column >= tl.sum(chosen.to(tl.int32), 0)) & (column < COUNT - 1))


@triton.jit
def _finish(
    q_ptr, key_ptr, value_ptr, length_ptr, table_ptr, best_ptr, blocks_ptr, out_ptr,
    tokens, capacity, spans, width, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
    BEST_P: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Merge the spans' best into the selection, and attend to it."""
    h = tl.program_id(0)
    z, b, t = query_place(length_ptr, tokens)
    first_head = (z * H + h) * GROUP
    q = load_queries(q_ptr, first_head, GROUP, GROUP_P, DIM, D)
    own = tl.where(t >= 0, t // SIZE, -1)
    scored = (own >= COUNT) & (COUNT > 1)
    i = tl.arange(0, BEST_P)
    span = i // (COUNT - 1)
    known = (span < spans) & (span * SPAN < own) & scored
    key = tl.load(best_ptr + (z * H + h) * spans * (COUNT - 1) + i, mask=known, other=-1)
    blocks_ptr += (z * H + h) * COUNT
    block = (key & 2147483647).to(tl.int32)
    _write_blocks(blocks_ptr, (key >> 32).to(tl.int32), block, own, scored, COUNT, COUNT_P)
    acc, _ = attend(
        q, key_ptr, value_ptr, table_ptr, blocks_ptr, b, h, t, 0, COUNT * SIZE, capacity, width, scale_log2,
        H, GROUP_P, DIM, D, SIZE, PAGE, KEYS, True, STAGES,
    )  # fmt: skip
    store_heads(out_ptr, acc, first_head, GROUP, GROUP_P, DIM, D)


@triton.jit
def _whole(
    q_ptr, key_ptr, value_ptr, pooled_ptr, length_ptr, table_ptr, score_ptr, blocks_ptr, out_ptr,
    tokens, capacity, slots, width, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, GROUP_R: tl.constexpr, DIM: tl.constexpr,
    D: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr, PAGE: tl.constexpr,
    SPAN: tl.constexpr, TILE: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Everything for one query and KV head whose cache has at most SPAN blocks."""
    h = tl.program_id(0)
    z, b, t = query_place(length_ptr, tokens)
    first_head = (z * H + h) * GROUP
    q = load_queries(q_ptr, first_head, GROUP, GROUP_P, DIM, D)
    own = tl.where(t >= 0, t // SIZE, -1)
    scored = (own >= COUNT) & (COUNT > 1)
    bits = tl.full([SPAN], -1, tl.int32)
    if scored:
        lse = _score_span(
            q, pooled_ptr, table_ptr, score_ptr, b, h, first_head, 0, (t + 1) // SIZE, slots, width, scale_log2,
            H, GROUP, GROUP_P, DIM, D, PAGE // SIZE, TILE, SPLIT, STAGES,
        )  # fmt: skip
        tl.debug_barrier()  # the scores the other threads wrote
        if GROUP_R < GROUP_P:  # heads that pad the tensor cores' tile need no softmax
            pick = tl.arange(0, GROUP_P)[None, :] == tl.arange(0, GROUP_R)[:, None]
            lse = tl.sum(tl.where(pick, lse[None, :], 0.0), 1)
        bits = _group_scores(score_ptr, lse, first_head, 0, own, slots, GROUP, GROUP_R, SPAN)
    blocks_ptr += (z * H + h) * COUNT
    _write_blocks(blocks_ptr, bits, tl.arange(0, SPAN), own, scored, COUNT, COUNT_P)
    acc, _ = attend(
        q, key_ptr, value_ptr, table_ptr, blocks_ptr, b, h, t, 0, COUNT * SIZE, capacity, width, scale_log2,
        H, GROUP_P, DIM, D, SIZE, PAGE, KEYS, True, STAGES,
    )  # fmt: skip
    store_heads(out_ptr, acc, first_head, GROUP, GROUP_P, DIM, D)


def span_of(pairs: int, slots: int, count: int) -> int:
    """Blocks a program scores: enough programs to fill a GPU, yet a merge of at most 2048 candidates."""
    span = 512
    while span > 64 and pairs * triton.cdiv(slots, span) < 264 and triton.cdiv(slots, span) * 2 * count <= 2048:
        span //= 2
    return span


def decode(q: Tensor, cache, spec, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, T, Hq, D], the last T places of each sequence: out like q, and the selection int32 [B, T, Hkv, count]."""
    batch, tokens, h_q, dim = q.shape
    heads, size, count, slots = cache.kv_heads, spec.block_size, spec.block_count, cache.slots
    group = h_q // heads
    group_r, group_p, wide = triton.next_power_of_2(group), 16, max(16, triton.next_power_of_2(dim))
    group_p = max(group_p, group_r)
    count_p = triton.next_power_of_2(count)
    rows, log2_scale, split = batch * tokens, scale * LOG2E, cache.pooled.shape[2] == 2
    width = 0 if cache.page_table is None else cache.page_table.shape[1]
    out = torch.empty_like(q)
    blocks = torch.empty(batch, tokens, heads, count, dtype=torch.int32, device=q.device)
    score = torch.empty(rows * h_q * slots if count > 1 else 0, dtype=torch.float32, device=q.device)
    tiles = tiles_of(q)
    if slots <= ONE_PROGRAM or count == 1:
        span = max(16, triton.next_power_of_2(slots)) if count > 1 else 16
        _whole[(heads, 1, rows)](
            q, cache.keys, cache.values, cache.pooled, cache.lengths, cache.page_table, score, blocks, out,
            tokens, cache.capacity, slots, width, log2_scale, heads, group, group_p, group_r, dim, wide, size, count,
            count_p, cache.page_size, span, tiles.pooled, tiles.keys, SPLIT=split,
            STAGES=tiles.whole[1], num_warps=tiles.whole[0],
        )  # fmt: skip
        return out, blocks
    span = span_of(rows * heads, slots, count)
    spans = triton.cdiv(slots, span)
    lse = torch.empty(rows * h_q * spans, dtype=torch.float32, device=q.device)
    best = torch.empty(rows * heads * spans * (count - 1), dtype=torch.int64, device=q.device)
    _score[(heads, spans, rows)](
        q, cache.pooled, cache.lengths, cache.page_table, score, lse, tokens, slots, width, log2_scale,
        heads, group, group_p, dim, wide, size, count, cache.page_size // size, span, tiles.pooled, SPLIT=split,
        STAGES=tiles.score[1], num_warps=tiles.score[0],
    )  # fmt: skip
    _choose[(heads, spans, rows)](
        score, lse, cache.lengths, best, tokens, slots, heads, group, group_r, size, count, count_p,
        span, triton.next_power_of_2(spans),
        num_warps=tiles.choose,
    )  # fmt: skip
    _finish[(heads, 1, rows)](
        q, cache.keys, cache.values, cache.lengths, cache.page_table, best, blocks, out,
        tokens, cache.capacity, spans, width, log2_scale, heads, group, group_p, dim, wide, size, count,
        count_p, cache.page_size, span, triton.next_power_of_2(spans * (count - 1)), tiles.keys,
        STAGES=tiles.finish[1], num_warps=tiles.finish[0],
    )  # fmt: skip
    return out, blocks
