"""Block-sparse attention: forward and dQ gather keys per token, dK/dV walk an inverse index per key block.

Loop orders: forward and dQ, one program per (token, KV head) over its selected keys; dK/dV, one program per (block,
KV head) over the tokens that selected it, in ascending order, so every sum has a fixed order and a run repeats bit
for bit. It refuses nothing: `triton_backend.py` has prepared the arguments (contiguous, head dimension a power of
two from 16).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_kernels.layout import remembered, slot_count
from ssa_kernels.triton.routing import LOG2E

PARTS = 4  # programs that may share a block selected by many tokens (an attention sink is selected by all of them)
TILE_BYTES = 1 << 15  # most of one key tile of dK/dV; larger blocks are walked in parts
SPAN = 512  # entries a program takes before another helps


@triton.jit
def _keys_of(blocks_ptr, place, first, s, t, SIZE: tl.constexpr, COUNT: tl.constexpr, KEYS: tl.constexpr):
    """Positions of KEYS selected keys from `first`, and which of them the token may see."""
    i = first + tl.arange(0, KEYS)
    block = tl.load(blocks_ptr + place + i // SIZE, mask=i < COUNT * SIZE, other=-1)
    key = s + block * SIZE + i % SIZE
    return key, (block >= 0) & (key <= t)


@triton.jit
def _token(doc_ptr, index_ptr, b, row, n, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr):
    t = tl.load(index_ptr + row) if HAS_INDEX else row
    s = tl.load(doc_ptr + b * n + t) if HAS_DOCS else t * 0
    return t, s


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, blocks_ptr, doc_ptr, index_ptr, o_ptr, lse_ptr,
    n, n_q, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, GROUP_P: tl.constexpr, KEYS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group: tl.constexpr = h_q // h_kv
    t, s = _token(doc_ptr, index_ptr, b, row, n, HAS_DOCS, HAS_INDEX)
    head, dim = tl.arange(0, GROUP_P), tl.arange(0, D)
    q_row = (b * n_q + row) * h_q + h * group + head
    q = tl.load(q_ptr + q_row[:, None] * D + dim[None, :], mask=(head < group)[:, None], other=0.0)
    place = ((b * n_q + row) * h_kv + h) * COUNT
    top = tl.full([GROUP_P], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    acc = tl.zeros([GROUP_P, D], tl.float32)
    for first in tl.range(0, COUNT * SIZE, KEYS, num_stages=STAGES):
        key, seen = _keys_of(blocks_ptr, place, first, s, t, SIZE, COUNT, KEYS)
        at = ((b * n + key) * h_kv + h) * D
        k_t = tl.load(k_ptr + at[None, :] + dim[:, None], mask=seen[None, :], other=0.0)
        v = tl.load(v_ptr + at[:, None] + dim[None, :], mask=seen[:, None], other=0.0)
        score = tl.dot(q, k_t, input_precision="tf32x3") * scale_log2
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = higher
    lse = tl.where(total > 0, top + tl.log2(total), float("inf"))
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o_ptr + q_row[:, None] * D + dim[None, :], acc.to(o_ptr.dtype.element_ty), mask=(head < group)[:, None])
    tl.store(lse_ptr + q_row, lse, mask=head < group)


@triton.jit
def _backward_q(
    q_ptr, k_ptr, v_ptr, blocks_ptr, doc_ptr, index_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr,
    n, n_q, scale, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, GROUP_P: tl.constexpr, KEYS: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
    ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group: tl.constexpr = h_q // h_kv
    t, s = _token(doc_ptr, index_ptr, b, row, n, HAS_DOCS, HAS_INDEX)
    head, dim = tl.arange(0, GROUP_P), tl.arange(0, D)
    real = head < group
    q_row = (b * n_q + row) * h_q + h * group + head
    q = tl.load(q_ptr + q_row[:, None] * D + dim[None, :], mask=real[:, None], other=0.0)
    do = tl.load(do_ptr + q_row[:, None] * D + dim[None, :], mask=real[:, None], other=0.0)
    lse = tl.load(lse_ptr + q_row, mask=real, other=float("inf"))
    delta = tl.load(delta_ptr + q_row, mask=real, other=0.0)
    place = ((b * n_q + row) * h_kv + h) * COUNT
    dq = tl.zeros([GROUP_P, D], tl.float32)
    for first in tl.range(0, COUNT * SIZE, KEYS, num_stages=STAGES):
        key, seen = _keys_of(blocks_ptr, place, first, s, t, SIZE, COUNT, KEYS)
        at = ((b * n + key) * h_kv + h) * D
        k = tl.load(k_ptr + at[:, None] + dim[None, :], mask=seen[:, None], other=0.0)
        v_t = tl.load(v_ptr + at[None, :] + dim[:, None], mask=seen[None, :], other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2
        weight = tl.where(seen[None, :], tl.exp2(score - lse[:, None]), 0.0)
        d_score = weight * (tl.dot(do, v_t, input_precision="tf32x3") - delta[:, None])
        dq = tl.dot(d_score.to(k.dtype), k, dq, input_precision="tf32x3")
    dq *= scale
    if ADD:
        dq += tl.load(dq_ptr + q_row[:, None] * D + dim[None, :], mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(dq_ptr + q_row[:, None] * D + dim[None, :], dq.to(dq_ptr.dtype.element_ty), mask=real[:, None])


@triton.jit
def _block_ids(
    blocks_ptr, doc_ptr, index_ptr, id_ptr, out_ptr,
    n, n_q, ids, segments, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr,
):  # fmt: skip
    """For each selected block of each token, its segment (batch row, KV head, block), [B, Hkv, Nq, count]."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row, column, real = i // COUNT, i % COUNT, i < n_q * COUNT
    t = tl.load(index_ptr + row, mask=real, other=0) if HAS_INDEX else row
    block = tl.load(blocks_ptr + ((b * n_q + row) * h_kv + h) * COUNT + column, mask=real, other=-1)
    used = block >= 0
    if HAS_DOCS:
        s = tl.load(doc_ptr + b * n + t, mask=real, other=0)
        place = s + block * SIZE
        used = used & (place < n)
        block = tl.load(id_ptr + b * n + place, mask=real & used, other=0)
    used = used & (block < ids)
    segment = tl.where(used, (b * h_kv + h) * ids + block, segments)
    tl.store(out_ptr + (b * h_kv + h) * n_q * COUNT + i, segment.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def _block_place(block_start_ptr, b, block, last, n, SIZE: tl.constexpr, HAS_DOCS: tl.constexpr):
    """First position and length of a block; a document's last block may be partial, and the next one follows it."""
    if HAS_DOCS:
        start = tl.load(block_start_ptr + b * n + block)
        return start, tl.load(block_start_ptr + b * n + block + 1, mask=block + 1 < last, other=n) - start
    return block * SIZE, tl.minimum(n - block * SIZE, SIZE)


@triton.jit
def _share(offset_ptr, segment, part, PARTS: tl.constexpr, SPAN: tl.constexpr):
    """How many programs share a segment, and the entries [begin, end) of one of them."""
    begin, end = tl.load(offset_ptr + segment), tl.load(offset_ptr + segment + 1)
    parts = tl.maximum(tl.minimum((end - begin + SPAN - 1) // SPAN, PARTS), 1)
    each = (end - begin + parts - 1) // parts
    begin += part * each
    return parts, begin, tl.minimum(end, begin + each)


@triton.jit
def _backward_kv(
    q_ptr, k_ptr, v_ptr, order_ptr, offset_ptr, block_start_ptr, block_total_ptr, index_ptr, do_ptr, lse_ptr, delta_ptr,
    dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr,
    n, n_q, ids, scale, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, SIZE_P: tl.constexpr, KEYS: tl.constexpr, GROUP_P: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_INDEX: tl.constexpr, ADD: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One program per (block, KV head, part of the tokens that selected it); a popular block is shared by PARTS."""
    h, part, b = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS, tl.program_id(2).to(tl.int64)
    group: tl.constexpr = h_q // h_kv
    TOKENS: tl.constexpr = ROWS // GROUP_P
    row_of, head, dim = tl.arange(0, ROWS) // GROUP_P, tl.arange(0, ROWS) % GROUP_P, tl.arange(0, D)
    last = tl.load(block_total_ptr + b) if HAS_DOCS else ids
    for block in range(tl.program_id(0), last, tl.num_programs(0)):
        parts, begin, end = _share(offset_ptr, (b * h_kv + h) * ids + block, part, PARTS, SPAN)
        if part < parts:
            start, size = _block_place(block_start_ptr, b, block, last, n, SIZE, HAS_DOCS)
            for lower in range(0, SIZE_P, KEYS):
                offset = lower + tl.arange(0, KEYS)
                key = start + offset
                key_real = offset < size
                at = ((b * n + key) * h_kv + h)[:, None] * D + dim[None, :]
                k = tl.load(k_ptr + at, mask=key_real[:, None], other=0.0)
                v = tl.load(v_ptr + at, mask=key_real[:, None], other=0.0)
                dk = tl.zeros([KEYS, D], tl.float32)
                dv = tl.zeros([KEYS, D], tl.float32)
                for first in tl.range(begin, end, TOKENS, num_stages=STAGES):
                    entry = first + row_of
                    real = (entry < end) & (head < group)
                    row = (tl.load(order_ptr + entry, mask=entry < end, other=0) // COUNT) % n_q
                    q_row = (b * n_q + row) * h_q + h * group + head
                    q = tl.load(q_ptr + q_row[:, None] * D + dim[None, :], mask=real[:, None], other=0.0)
                    do = tl.load(do_ptr + q_row[:, None] * D + dim[None, :], mask=real[:, None], other=0.0)
                    lse = tl.load(lse_ptr + q_row, mask=real, other=float("inf"))
                    delta = tl.load(delta_ptr + q_row, mask=real, other=0.0)
                    t = tl.load(index_ptr + row, mask=real, other=-1) if HAS_INDEX else row
                    score = tl.dot(k, tl.trans(q), input_precision="tf32x3") * scale_log2
                    seen = key_real[:, None] & real[None, :] & (key[:, None] <= t[None, :])
                    weight = tl.where(seen, tl.exp2(score - lse[None, :]), 0.0)
                    dv = tl.dot(weight.to(do.dtype), do, dv, input_precision="tf32x3")
                    d_score = weight * (tl.dot(v, tl.trans(do), input_precision="tf32x3") - delta[None, :])
                    dk = tl.dot(d_score.to(q.dtype), q, dk, input_precision="tf32x3")
                dk *= scale
                if parts > 1:
                    out = part * (tl.num_programs(2).to(tl.int64) * n * h_kv * D) + at
                    tl.store(dk_part_ptr + out, dk, mask=key_real[:, None])
                    tl.store(dv_part_ptr + out, dv, mask=key_real[:, None])
                else:
                    if ADD:
                        dk += tl.load(dk_ptr + at, mask=key_real[:, None], other=0.0).to(tl.float32)
                        dv += tl.load(dv_ptr + at, mask=key_real[:, None], other=0.0).to(tl.float32)
                    tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=key_real[:, None])
                    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=key_real[:, None])


@triton.jit
def _sum_parts(
    offset_ptr, block_start_ptr, block_total_ptr, dk_ptr, dv_ptr, dk_part_ptr, dv_part_ptr,
    n, ids, h_kv: tl.constexpr, SIZE: tl.constexpr, D: tl.constexpr, SIZE_P: tl.constexpr,
    PARTS: tl.constexpr, SPAN: tl.constexpr, HAS_DOCS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Add the parts of each shared block, in order, so that the sum repeats bit for bit."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dim, offset = tl.arange(0, D), tl.arange(0, SIZE_P)
    last = tl.load(block_total_ptr + b) if HAS_DOCS else ids
    for block in range(tl.program_id(0), last, tl.num_programs(0)):
        parts, _, _ = _share(offset_ptr, (b * h_kv + h) * ids + block, 0, PARTS, SPAN)
        if parts > 1:
            start, size = _block_place(block_start_ptr, b, block, last, n, SIZE, HAS_DOCS)
            real = (offset < size)[:, None]
            at = ((b * n + start + offset) * h_kv + h)[:, None] * D + dim[None, :]
            dk = tl.zeros([SIZE_P, D], tl.float32)
            dv = tl.zeros([SIZE_P, D], tl.float32)
            for part in range(parts):
                source = part * (tl.num_programs(2).to(tl.int64) * n * h_kv * D) + at
                dk += tl.load(dk_part_ptr + source, mask=real, other=0.0)
                dv += tl.load(dv_part_ptr + source, mask=real, other=0.0)
            if ADD:
                dk += tl.load(dk_ptr + at, mask=real, other=0.0).to(tl.float32)
                dv += tl.load(dv_ptr + at, mask=real, other=0.0).to(tl.float32)
            tl.store(dk_ptr + at, dk.to(dk_ptr.dtype.element_ty), mask=real)
            tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=real)


def _number_blocks(doc_starts: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks of a packed row from left to right: number of each token's block, first position of each, how many."""
    batch, n = doc_starts.shape
    place = torch.arange(n, device=doc_starts.device, dtype=torch.int32)
    begins = (place - doc_starts) % size == 0
    block_id = (begins.cumsum(1, dtype=torch.int32) - 1).to(torch.int32)
    block_start = torch.full((batch, n + 1), n, dtype=torch.int32, device=doc_starts.device)
    block_start.scatter_(1, torch.where(begins, block_id, n).long(), place.expand(batch, -1))
    return block_id, block_start[:, :n].contiguous(), block_id[:, -1] + 1


def inverse_index(blocks: Tensor, n: int, size: int, doc_starts: Tensor | None, query_index: Tensor | None):
    """For each (batch row, KV head, block), the entries of `blocks` that select it: a stable counting order.

    Returns order int64 [entries], offsets int32 [segments + 1], block starts and totals (documents only), blocks per
    row.
    """
    batch, n_q, h_kv, count = blocks.shape
    device = blocks.device
    block_id = block_start = total = None
    ids = slot_count(n, size)
    if doc_starts is not None:
        ids = n
        block_id, block_start, total = remembered(
            doc_starts, f"blocks {size}", lambda: _number_blocks(doc_starts, size)
        )
    segments = batch * h_kv * ids
    # A radix sort reads every bit: half of them, half the time. `segments` itself stands for blocks that nobody owns.
    kind = torch.int16 if segments < 1 << 15 else torch.int32
    segment = torch.empty(batch * h_kv * n_q * count, dtype=kind, device=device)
    _block_ids[(triton.cdiv(n_q * count, 1024), h_kv, batch)](
        blocks, doc_starts, query_index, block_id, segment, n, n_q, ids, segments, h_kv, size, count, 1024,
        HAS_DOCS=doc_starts is not None, HAS_INDEX=query_index is not None,
    )  # fmt: skip
    ordered, order = segment.sort(stable=True)
    edges = torch.arange(segments + 1, dtype=kind, device=device)
    offsets = torch.searchsorted(ordered, edges, out_int32=True)
    return order, offsets, block_start, total, ids


def forward(q, k, v, blocks, size: int, scale: float, doc_starts, query_index, config) -> tuple[Tensor, Tensor]:
    """o [B, Nq, Hq, D] in q's dtype and log2-sum-exp2 fp32 [B, Nq, Hq]."""
    batch, n_q, h_q, dim = q.shape
    n, h_kv = k.shape[1:3]
    o, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    _forward[(n_q, h_kv, batch)](
        q, k, v, blocks, doc_starts, query_index, o, lse, n, n_q, scale * LOG2E, h_q, h_kv, size, blocks.shape[3], dim,
        max(16, triton.next_power_of_2(h_q // h_kv)), max(16, config.sparse_keys),
        HAS_DOCS=doc_starts is not None, HAS_INDEX=query_index is not None,
        STAGES=config.sparse_stages, num_warps=config.sparse_warps,
    )  # fmt: skip
    return o, lse


def backward_q(q, k, v, blocks, lse, do, delta, size: int, scale: float, doc_starts, query_index, config, dq=None):
    """dq [B, Nq, Hq, D]; added to the one given."""
    batch, n_q, h_q, dim = q.shape
    n, h_kv, add = k.shape[1], k.shape[2], dq is not None
    dq = dq if add else torch.empty_like(q)
    _backward_q[(n_q, h_kv, batch)](
        q, k, v, blocks, doc_starts, query_index, do, lse, delta, dq, n, n_q, scale, scale * LOG2E, h_q, h_kv, size,
        blocks.shape[3], dim, max(16, triton.next_power_of_2(h_q // h_kv)), max(16, config.dq_keys),
        HAS_DOCS=doc_starts is not None, HAS_INDEX=query_index is not None, ADD=add,
        STAGES=config.dq_stages, num_warps=config.dq_warps,
    )  # fmt: skip
    return dq


def backward_kv(q, k, v, index, lse, do, delta, size: int, count: int, scale: float, query_index, config, dkv=None):
    """dk, dv [B, N, Hkv, D]; added to the pair given. `index`: what `inverse_index` returned."""
    batch, n_q, h_q, dim = q.shape
    n, h_kv, add = k.shape[1], k.shape[2], dkv is not None
    dk, dv = dkv if add else (torch.empty_like(k), torch.empty_like(v))
    order, offsets, block_start, total, ids = index
    group_p, size_p = triton.next_power_of_2(h_q // h_kv), max(16, triton.next_power_of_2(size))
    keys = size_p  # of one walk over the tokens: two tiles [keys, D] must fit in shared memory
    while keys > 16 and keys * dim * k.element_size() > TILE_BYTES:
        keys //= 2
    dk_part, dv_part = (torch.empty(PARTS, *k.shape, dtype=torch.float32, device=k.device) for _ in range(2))
    grid = slot_count(n, size)
    _backward_kv[(grid, h_kv * PARTS, batch)](
        q, k, v, order, offsets, block_start, total, query_index, do, lse, delta, dk, dv, dk_part, dv_part,
        n, n_q, ids, scale, scale * LOG2E, h_q, h_kv, size, count, dim, size_p, keys, group_p,
        max(config.dkv_rows, group_p), PARTS, SPAN, HAS_DOCS=total is not None, HAS_INDEX=query_index is not None,
        ADD=add, STAGES=config.dkv_stages, num_warps=config.dkv_warps,
    )  # fmt: skip
    _sum_parts[(grid, h_kv, batch)](
        offsets, block_start, total, dk, dv, dk_part, dv_part, n, ids, h_kv, size, dim, size_p, PARTS, SPAN,
        HAS_DOCS=total is not None, ADD=add, num_warps=1,
    )  # fmt: skip
    return dk, dv


def backward(
    q, k, v, blocks, lse, do, delta, size: int, scale: float, doc_starts, query_index, config, add_to=None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv; added in place to the gradients in `add_to` when given."""
    dq, dk, dv = add_to or (None, None, None)
    dq = backward_q(q, k, v, blocks, lse, do, delta, size, scale, doc_starts, query_index, config, dq)
    index = inverse_index(blocks, k.shape[1], size, doc_starts, query_index)
    pair = None if dk is None else (dk, dv)
    count = blocks.shape[3]
    return dq, *backward_kv(q, k, v, index, lse, do, delta, size, count, scale, query_index, config, pair)
