"""Decode attention by splits: the keys of a sequence shared among programs, whose partial sums a second launch adds.

Serves full decode (every key up to the query) and lists of blocks too long for one program. The split follows the
length on the device while the launch is sized by the capacity, so a CUDA graph can hold it. Sums are added in a fixed
order: a run repeats bit for bit. It refuses nothing: `inference.py` has seen the arguments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_kernels.triton.decode import attend, load_queries, query_place, store_heads, tiles_of
from ssa_kernels.triton.routing import LOG2E


@triton.jit
def _attend_part(
    q_ptr, key_ptr, value_ptr, length_ptr, table_ptr, blocks_ptr, out_ptr, part_ptr, lse_ptr,
    tokens, capacity, width, scale_log2,
    H: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, COUNT: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one query and KV head; COUNT 0: every key up to the query, else the keys of COUNT listed blocks."""
    h, part = tl.program_id(0), tl.program_id(1)
    z, b, t = query_place(length_ptr, tokens)
    first_head = (z * H + h) * GROUP
    q = load_queries(q_ptr, first_head, GROUP, GROUP_P, DIM, D)
    LISTED: tl.constexpr = COUNT > 0
    if LISTED:
        keys = COUNT * SIZE
        blocks_ptr += (z * H + h) * COUNT
    else:
        keys = tl.maximum(t + 1, 0)
    each = tl.cdiv(tl.cdiv(keys, KEYS), SPLITS) * KEYS
    begin = part * each
    acc, lse = attend(
        q, key_ptr, value_ptr, table_ptr, blocks_ptr, b, h, t, begin, tl.minimum(begin + each, keys), capacity, width,
        scale_log2, H, GROUP_P, DIM, D, SIZE, PAGE, KEYS, LISTED, STAGES,
    )  # fmt: skip
    if SPLITS == 1:
        store_heads(out_ptr, acc, first_head, GROUP, GROUP_P, DIM, D)
    else:
        head, dim = tl.arange(0, GROUP_P), tl.arange(0, D)
        row = (first_head + head) * SPLITS + part
        keep = (head < GROUP)[:, None] & (dim < DIM)[None, :]
        tl.store(part_ptr + row[:, None] * DIM + dim[None, :], acc, mask=keep)
        tl.store(lse_ptr + row, lse, mask=head < GROUP)


@triton.jit
def _combine(part_ptr, lse_ptr, out_ptr, DIM: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr):
    """Weigh the splits of one query head by what each saw; nothing seen at all gives zeros."""
    row = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, D)
    lse = tl.load(lse_ptr + row * SPLITS + split)
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == -float("inf"), 0.0, top))
    weight /= tl.maximum(tl.sum(weight, 0), 1e-30)
    keep = (dim < DIM)[None, :]
    part = tl.load(part_ptr + (row * SPLITS + split)[:, None] * DIM + dim[None, :], mask=keep, other=0.0)
    out = tl.sum(part * weight[:, None], 0)
    tl.store(out_ptr + row * DIM + dim, out.to(out_ptr.dtype.element_ty), mask=dim < DIM)


def split_count(q: Tensor, pairs: int, keys: int) -> int:
    """Programs that share one query and KV head: about four for each of the GPU's processors, each with 256 keys."""
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    wanted = min(triton.cdiv(4 * processors, pairs), triton.cdiv(keys, 256), 128)
    return triton.next_power_of_2(wanted)


def attend_by_splits(q: Tensor, cache, scale: float, blocks: Tensor | None = None) -> Tensor:
    """q [B, T, Hq, D], the last T places of each sequence; blocks int32 [B, T, Hkv, count], None: attend to every key."""
    batch, tokens, h_q, dim = q.shape
    heads, wide = cache.kv_heads, max(16, triton.next_power_of_2(dim))
    group, rows, count = h_q // heads, batch * tokens, 0 if blocks is None else blocks.shape[3]
    splits = split_count(q, rows * heads, count * cache.block_size or cache.capacity)
    tiles = tiles_of(q)
    width = 0 if cache.page_table is None else cache.page_table.shape[1]
    out = torch.empty_like(q)
    part = torch.empty(rows * h_q * splits * dim if splits > 1 else 0, dtype=torch.float32, device=q.device)
    lse = torch.empty(rows * h_q * splits, dtype=torch.float32, device=q.device)
    _attend_part[(heads, splits, rows)](
        q, cache.keys, cache.values, cache.lengths, cache.page_table, blocks, out, part, lse,
        tokens, cache.capacity, width, scale * LOG2E, heads, group, max(16, triton.next_power_of_2(group)), dim, wide,
        cache.block_size, count, cache.page_size, splits, tiles.keys, STAGES=3, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        _combine[(rows * h_q,)](part, lse, out, dim, wide, splits, num_warps=1)
    return out
