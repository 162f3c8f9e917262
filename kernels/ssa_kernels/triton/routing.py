"""Routing kernels: pooled keys, the softmax statistics of their scores, group scores and their exact streaming top-k.

Two passes over pooled keys (the group's score is a sum of softmaxes, so the normalisers come first; one pass where a
group is a single head), and no `[N, N / b]` score tensor ever exists. The blocks complete at token `t` of a document that
begins at `s` fill the slots from `s // b` on without a gap, so visibility is arithmetic and most tiles need no mask.
It refuses nothing: `triton_backend.py` has prepared the arguments (contiguous, head dimension a power of two from 16).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_kernels.layout import slot_count
from ssa_kernels.spec import BlockSpec
from ssa_kernels.triton.topk import CHUNK, HIGHEST, LOWEST, append, cut, ordered, read

LOG2E = 1.4426950408889634
ABSENT = tl.constexpr(-(1 << 62))
SCRATCH = 64 << 20  # bytes that the lists of candidates may take: large budgets run in fewer programs
SPARE = tl.constexpr(16)  # a cut on the way may leave so many candidates too many: it needs fewer steps


@triton.jit
def _pool(
    k_ptr, doc_ptr, high_ptr, low_ptr,
    n, slots, factor, h_kv: tl.constexpr, SIZE: tl.constexpr, SIZE_P: tl.constexpr, D: tl.constexpr,
    HAS_DOCS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program per (slot, KV head, batch row): the mean key, times `factor`, of the complete block in the slot."""
    slot, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    row, dim = tl.arange(0, SIZE_P), tl.arange(0, D)
    place = slot * SIZE + row
    if HAS_DOCS:
        inside = (row < SIZE) & (place + SIZE <= n)
        doc = tl.load(doc_ptr + b * n + place, mask=inside, other=-1)
        last = tl.load(doc_ptr + b * n + place + SIZE - 1, mask=inside, other=-2)
        begins = inside & (doc == last) & ((place - doc) % SIZE == 0)
        start = tl.max(tl.where(begins, place, -1), 0)
    else:
        start = tl.where(slot * SIZE + SIZE <= n, slot * SIZE, -1)
    keep = (row < SIZE) & (start >= 0)
    at = ((b * n + start + row)[:, None] * h_kv + h) * D + dim[None, :]
    mean = tl.sum(tl.load(k_ptr + at, mask=keep[:, None], other=0.0).to(tl.float32), 0) / SIZE * factor
    out = ((b * h_kv + h) * slots + slot) * D + dim
    high = mean.to(high_ptr.dtype.element_ty)
    tl.store(high_ptr + out, high)
    if SPLIT:  # what rounding to half precision lost, as a second half-precision number
        tl.store(low_ptr + out, (mean - high.to(tl.float32)).to(high_ptr.dtype.element_ty))


@triton.jit
def _pooled(high_ptr, low_ptr, slot, slots, D: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr):
    """Both halves [D, tile] of the pooled keys in these slots."""
    at = slot[None, :] * D + tl.arange(0, D)[:, None]
    if MASKED:
        here = (slot < slots)[None, :]
        high = tl.load(high_ptr + at, mask=here, other=0.0)
        low = tl.load(low_ptr + at, mask=here, other=0.0) if SPLIT else high
    else:
        high = tl.load(high_ptr + at)
        low = tl.load(low_ptr + at) if SPLIT else high
    return high, low


@triton.jit
def _scores(q, high, low, SPLIT: tl.constexpr):
    """Scores [rows, tile] in log2 units; the low half restores the precision that selection needs."""
    score = tl.dot(q, high, input_precision="tf32x3")
    if SPLIT:
        score = tl.dot(q, low, score)
    return score


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
def _tiles_of_sums(
    top, total, q, high_ptr, low_ptr, begin, end, begins, ends, slots,
    D: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the tiles from `begin` to `end` to each row's running maximum and sum."""
    for first in tl.range(begin, end, TILE, num_stages=STAGES):
        slot = first + tl.arange(0, TILE)
        high, low = _pooled(high_ptr, low_ptr, slot, slots, D, SPLIT, MASKED)
        score = _scores(q, high, low, SPLIT)
        if MASKED:
            seen = (slot[None, :] >= begins[:, None]) & (slot[None, :] < ends[:, None])
            score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(score - safe[:, None]), 1)
        top = higher
    return top, total


@triton.jit
def _statistics(
    q_ptr, high_ptr, low_ptr, doc_ptr, index_ptr, lse_ptr,
    n, n_q, slots, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Log2-sum-exp2 of the scores over the blocks complete at a token, fp32 [B, Nq, Hq]; +inf where there is none.

    A row is a (token, head of the group), so that few tokens, whose blocks are nearly the same, share a tile.
    """
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    group: tl.constexpr = h_q // h_kv
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)  # the longest rows start first
    token, real = row // group, row < n_q * group
    t, s = _places(doc_ptr, index_ptr, b, token, n, n_q, HAS_DOCS, HAS_INDEX)
    head = (b * n_q + token) * h_q + h * group + row % group
    begins = s // SIZE
    ends = begins + (t + 1 - s) // SIZE
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if tl.max((t - s) // SIZE, 0) >= COUNT:  # otherwise every earlier block is selected and no score is needed
        q = tl.load(q_ptr + head[:, None] * D + tl.arange(0, D)[None, :], mask=real[:, None], other=0.0)
        base = (b * h_kv + h) * slots * D
        begin = tl.min(tl.where(real, begins, HIGHEST), 0)
        middle = begin
        if tl.max(begins, 0) == begin:  # one document: every row sees all of these tiles
            middle += (tl.min(tl.where(real, ends, HIGHEST), 0) - begin) // TILE * TILE
        top, total = _tiles_of_sums(
            top, total, q, high_ptr + base, low_ptr + base, begin, middle, begins, ends, slots,
            D, TILE, SPLIT, False, STAGES,
        )  # fmt: skip
        top, total = _tiles_of_sums(
            top, total, q, high_ptr + base, low_ptr + base, middle, tl.max(ends, 0), begins, ends, slots,
            D, TILE, SPLIT, True, STAGES,
        )  # fmt: skip
    lse = tl.where(total > 0, top + tl.log2(total), float("inf"))
    tl.store(lse_ptr + head, lse, mask=real)


@triton.jit
def _group_keys(
    q_ptr, lse_ptr, high, low, head, real,
    group: tl.constexpr, D: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Ordered keys [rows, tile] of the group's score; one head's softmax orders as its raw score does."""
    at = head[:, None] * D + tl.arange(0, D)[None, :]
    if group == 1:
        key = ordered(_scores(tl.load(q_ptr + at, mask=real[:, None], other=0.0), high, low, SPLIT))
    else:
        total = tl.zeros([head.shape[0], high.shape[1]], tl.float32)
        for i in tl.range(0, group, num_stages=STAGES):
            q = tl.load(q_ptr + at + i * D, mask=real[:, None], other=0.0)
            lse = tl.load(lse_ptr + head + i, mask=real, other=float("inf"))
            total += tl.exp2(_scores(q, high, low, SPLIT) - lse[:, None])
        key = total.to(tl.int32, bitcast=True)
    return key


@triton.jit
def _select(
    q_ptr, high_ptr, low_ptr, doc_ptr, index_ptr, lse_ptr, key_ptr, slot_ptr, out_ptr,
    n, n_q, slots, batch, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, CAPACITY: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr, SPLIT: tl.constexpr, REFERENCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Selections of ROWS tokens of one KV head at a time; the programs that fit the GPU share the work, longest first."""
    key_ptr += tl.program_id(0).to(tl.int64) * CAPACITY * ROWS
    slot_ptr += tl.program_id(0).to(tl.int64) * CAPACITY * ROWS
    row_tiles = tl.cdiv(n_q, ROWS)
    for work in range(tl.program_id(0), row_tiles * h_kv * batch, tl.num_programs(0)):
        h = work % h_kv
        b = (work // h_kv % batch).to(tl.int64)
        rows = (row_tiles - 1 - work // h_kv // batch) * ROWS + tl.arange(0, ROWS)
        real = rows < n_q
        t, s = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
        own = (t - s) // SIZE
        begins = s // SIZE
        ends = begins + own
        # "exact": one contest for all places. "reference": the best 8 before the token's chunk of 16, and the chunk's 7.
        edge = begins + own // 16 * 16 if REFERENCE else ends
        keep: tl.constexpr = 8 if REFERENCE else COUNT - 1
        place = ((b * n_q + rows) * h_kv + h) * COUNT
        tl.store(out_ptr + place, own, mask=real)
        if tl.max(own, 0) < COUNT:  # every earlier block is selected
            column = tl.arange(0, CHUNK)[None, :]
            for first in range(0, COUNT - 1, CHUNK):
                block = tl.where(first + column < own[:, None], first + column, -1)
                mask = real[:, None] & (first + column < COUNT - 1)
                tl.store(out_ptr + place[:, None] + 1 + first + column, block, mask=mask)
        elif COUNT > 1:
            base = (b * h_kv + h) * slots * D
            head = (b * n_q + rows) * h_q + h * (h_q // h_kv)
            threshold = tl.full([ROWS], LOWEST, tl.int32)
            held = tl.zeros([ROWS], tl.int32)
            begin, end = tl.min(tl.where(real, begins, HIGHEST), 0), tl.max(ends, 0)
            for first in range(begin, end + TILE, TILE):  # the last round only cuts
                if (first >= end) | (tl.max(held, 0) > CAPACITY - TILE):
                    spare = tl.where(first < end, SPARE, 0)
                    threshold, held = cut(key_ptr, slot_ptr, held, begins, edge, keep, spare, CAPACITY, REFERENCE)
                if first < end:
                    slot = first + tl.arange(0, TILE)
                    high, low = _pooled(high_ptr + base, low_ptr + base, slot, slots, D, SPLIT, True)
                    key = _group_keys(q_ptr, lse_ptr, high, low, head, real, h_q // h_kv, D, SPLIT, STAGES)
                    slot = slot[None, :] + tl.zeros_like(key)
                    enters = (slot >= begins[:, None]) & (slot < ends[:, None])
                    if REFERENCE:
                        enters = enters & ((key > threshold[:, None]) | (slot >= edge[:, None]))
                    else:
                        enters = enters & (key > threshold[:, None])
                    held = append(key_ptr, slot_ptr, key, slot, enters, held, CAPACITY)
            if REFERENCE:
                late = tl.where(edge > begins, 7, COUNT - 1)
                threshold, held = cut(key_ptr, slot_ptr, held, edge, ends, late, 0, CAPACITY, True)
            for first in range(0, COUNT - 1, CHUNK):
                column = first + tl.arange(0, CHUNK)[None, :]
                _, slot, member = read(key_ptr, slot_ptr, first, held, begins, ends, CAPACITY, CHUNK, False)
                block = tl.where(member, slot - begins[:, None], -1)
                tl.store(out_ptr + place[:, None] + 1 + column, block, mask=real[:, None] & (column < COUNT - 1))
        tl.debug_barrier()  # the next rows reuse the places


@triton.jit
def _merge(best, key, KEEP: tl.constexpr, FEW: tl.constexpr):
    """The KEEP largest of each row's list and its distinct keys of a tile, in any order."""
    rows: tl.constexpr = best.shape[0]
    entering = tl.max(tl.sum((key > tl.min(best, 1)[:, None]).to(tl.int32), 1), 0)
    if entering <= FEW:  # cheaper one by one: a row's best key takes the place of the least of its list
        for _ in range(entering):
            most, least = tl.max(key, 1)[:, None], tl.min(best, 1)[:, None]
            best = tl.where(best == least, tl.maximum(most, least), best)
            key = tl.where(key == most, ABSENT, key)
    else:
        best = tl.topk(tl.reshape(tl.join(best, tl.topk(key, KEEP)), [rows, 2 * KEEP]), KEEP)
    return best


@triton.jit
def _packed(key, RAW: tl.constexpr):
    """int32 [rows, tile]: `key`, as `_group_keys` gives it, over the place in the tile, the first place largest.

    So one maximum finds score and place. A group's score keeps 19 bits of mantissa (2e-6 of it; tile 128) from 2^-58 on, a raw
    score (RAW) 17 bits (tile 64): less than the ties that a selection may break, and what is equal is still equal.
    """
    tile: tl.constexpr = key.shape[1]
    if not RAW:
        key = (tl.maximum(key - 0x22800000, 0) << 3) + (LOWEST + tile)  # 0x22800000: 2^-58; above what is no candidate
    return (key & -tile) | (tl.arange(0, tile) ^ (tile - 1))[None, :]


@triton.jit
def _insert(best, key, first):
    """`best`, int64 (packed score, lower slots larger) in any order, after a tile's packed keys; its slots begin at `first`.

    A row's largest key takes the place of the least of its list while it is larger: a hundred instructions a round, where a
    bitonic merge of 64-bit keys has thousands. The row that most keys enter decides how many rounds there are.
    """
    low: tl.constexpr = key.shape[1] - 1
    most, least = tl.max(key, 1), tl.min(best, 1)
    enters = most > ((least >> 32).to(tl.int32) | low)
    while tl.max(enters.to(tl.int32), 0) > 0:
        slot = ((most & low) ^ low) + first
        entry = (most & ~low).to(tl.int64) << 32 | (slot ^ HIGHEST).to(tl.int64)
        best = tl.where(best == least[:, None], tl.where(enters, entry, least)[:, None], best)
        key = tl.where(key == most[:, None], LOWEST, key)
        most, least = tl.max(key, 1), tl.min(best, 1)
        enters = most > ((least >> 32).to(tl.int32) | low)
    return best


@triton.jit
def _select_sorted(
    q_ptr, high_ptr, low_ptr, doc_ptr, index_ptr, lse_ptr, out_ptr,
    n, n_q, slots, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, KEEP: tl.constexpr, FEW: tl.constexpr, PACKED: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr, SPLIT: tl.constexpr, REFERENCE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Selections of ROWS tokens of one KV head, for budgets whose lists of candidates fit in registers."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    real = rows < n_q
    t, s = _places(doc_ptr, index_ptr, b, rows, n, n_q, HAS_DOCS, HAS_INDEX)
    own = (t - s) // SIZE
    begins = s // SIZE
    ends = begins + own
    edge = (begins + own // 16 * 16)[:, None]  # reference rule only: where the current chunk of 16 begins
    base = (b * h_kv + h) * slots * D
    head = (b * n_q + rows) * h_q + h * (h_q // h_kv)
    rank = tl.arange(0, KEEP)[None, :]
    nothing: tl.constexpr = -(1 << 63) if PACKED else -(1 << 61)
    best = tl.full([ROWS, 1], nothing, tl.int64) + rank  # distinct, and below every key
    early = best
    scored = (tl.max(own, 0) >= COUNT) & (COUNT > 1)
    if scored:
        for first in range(tl.min(tl.where(real, begins, HIGHEST), 0), tl.max(ends, 0), TILE):
            slot = first + tl.arange(0, TILE)
            high, low = _pooled(high_ptr + base, low_ptr + base, slot, slots, D, SPLIT, True)
            key = _group_keys(q_ptr, lse_ptr, high, low, head, real, h_q // h_kv, D, SPLIT, STAGES)
            seen = (slot[None, :] >= begins[:, None]) & (slot[None, :] < ends[:, None])
            before = seen & (slot[None, :] < edge)
            late = (seen & (slot[None, :] >= edge)) if REFERENCE else seen
            if PACKED:
                key = _packed(key, h_q == h_kv)
                if REFERENCE:
                    early = _insert(early, tl.where(before, key, LOWEST), first)
                best = _insert(best, tl.where(late, key, LOWEST), first)
            else:  # unsigned, over a low word that makes keys distinct, lower slots larger
                key = ((key ^ LOWEST).to(tl.int64) & 0xFFFFFFFF) << 31 | (slot ^ HIGHEST)[None, :].to(tl.int64)
                if REFERENCE:
                    early = _merge(early, tl.where(before, key, ABSENT), KEEP, FEW)
                best = _merge(best, tl.where(late, key, ABSENT), KEEP, FEW)
    least: tl.constexpr = nothing + (1 << 32)
    best = tl.topk(best, KEEP)
    slot = (best & HIGHEST).to(tl.int32) ^ HIGHEST
    block = tl.where((best >= least) & (rank < COUNT - 1), slot - begins[:, None], HIGHEST)
    column = rank
    if REFERENCE:
        early = tl.topk(early, KEEP)
        slot = (early & HIGHEST).to(tl.int32) ^ HIGHEST
        old = tl.where((early >= least) & (rank < 8), slot - begins[:, None], HIGHEST)
        block = tl.where((edge > begins[:, None]) & (rank >= 7), HIGHEST, block)
        block = tl.reshape(tl.join(block, old), [ROWS, 2 * KEEP])
        column = tl.arange(0, 2 * KEEP)[None, :]
    block = tl.sort(block)
    if not scored:  # every earlier block is selected
        block = tl.where(column < own[:, None], column + tl.zeros_like(block), HIGHEST)
    block = tl.where(block == HIGHEST, -1, block)
    place = ((b * n_q + rows) * h_kv + h) * COUNT
    tl.store(out_ptr + place[:, None] + 1 + column, block, mask=real[:, None] & (column < COUNT - 1))
    tl.store(out_ptr + place, own, mask=real)


def pool_keys(
    k_bnhd: Tensor, block_size: int, doc_starts: Tensor | None, factor: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Mean keys times `factor`, [B, Hkv, slots, D], as (high, low) halves; zero where a slot holds no complete block.

    fp32 keys have no low half.
    """
    batch, n, heads, dim = k_bnhd.shape
    slots = slot_count(n, block_size)
    high = torch.empty(batch, heads, slots, dim, dtype=k_bnhd.dtype, device=k_bnhd.device)
    split = k_bnhd.dtype != torch.float32
    low = torch.empty_like(high) if split else high
    _pool[(slots, heads, batch)](
        k_bnhd, doc_starts, high, low, n, slots, factor, heads, block_size,
        triton.next_power_of_2(block_size), dim, HAS_DOCS=doc_starts is not None, SPLIT=split, num_warps=1,
    )  # fmt: skip
    return high, low if split else None


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def select_blocks(
    q: Tensor, k: Tensor, spec: BlockSpec, scale: float, doc_starts: Tensor | None, query_index: Tensor | None, config
) -> Tensor:
    """int32 [B, Nq, Hkv, block_count]; see `ssa_kernels.api.select_blocks`. `config`: rows, tile, warps of each pass."""
    batch, n_q, h_q, dim = q.shape
    n, h_kv = k.shape[1:3]
    group, device = h_q // h_kv, q.device
    high, low = pool_keys(k, spec.block_size, doc_starts, scale * LOG2E)
    slots = high.shape[2]
    flags = {"HAS_DOCS": doc_starts is not None, "HAS_INDEX": query_index is not None, "SPLIT": low is not None}
    low = high if low is None else low
    lse = None
    if group > 1:
        lse = torch.empty(batch, n_q, h_q, dtype=torch.float32, device=device)
        _statistics[(triton.cdiv(n_q * group, config.stat_rows), h_kv, batch)](
            q, high, low, doc_starts, query_index, lse, n, n_q, slots, h_q, h_kv, spec.block_size, spec.block_count, dim,
            config.stat_rows, config.stat_tile, **flags, STAGES=config.stat_stages, num_warps=config.stat_warps,
            maxnreg=config.stat_registers,
        )  # fmt: skip
    out = torch.empty(batch, n_q, h_kv, spec.block_count, dtype=torch.int32, device=device)
    rows, tile = config.select_rows, config.select_tile
    flags |= {"REFERENCE": spec.reference, "STAGES": config.select_stages}
    flags |= {"num_warps": config.select_warps, "maxnreg": config.select_registers}
    if spec.block_count <= config.select_sorted:
        keep = max(2, triton.next_power_of_2(max(1, spec.block_count - 1)))
        # Scores at the border of a selection are at most group / (block_count - 1): packed keys resolve them.
        packed = keep <= 32 and (group == 1 or group <= spec.block_count)
        tile = config.insert_tile if packed and group > 1 else max(tile, keep)
        rows = max(16, min(rows, (8192 if packed else 4096) // tile))
        _select_sorted[(triton.cdiv(n_q, rows), h_kv, batch)](
            q, high, low, doc_starts, query_index, lse, out, n, n_q, slots, h_q, h_kv, spec.block_size, spec.block_count,
            dim, rows, tile, keep, config.select_few, packed, **flags,
        )  # fmt: skip
        return out
    capacity = triton.cdiv(spec.block_count + 32, 64) * 64 + max(tile, spec.block_count)
    most = min(config.select_programs * _processors(device), SCRATCH // (8 * capacity * rows))
    programs = max(1, min(triton.cdiv(n_q, rows) * h_kv * batch, most))
    key, slot = (torch.empty(programs, capacity, rows, dtype=torch.int32, device=device) for _ in range(2))
    _select[(programs,)](
        q, high, low, doc_starts, query_index, lse, key, slot, out,
        n, n_q, slots, batch, h_q, h_kv, spec.block_size, spec.block_count, dim, rows, tile, capacity, **flags,
    )  # fmt: skip
    return out
