"""Appending a decode step's tokens to a cache in one launch: keys, values, pooled keys of completed blocks, lengths.

One program per sequence, so that the program that reads a length is the one that raises it and a CUDA graph can replay
the launch. A token for which there is no room is dropped (the host's count refuses it first); an idle sequence
(length -1) is left alone.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def cache_rows(table_ptr, b, place, seen, rows, width, PAGE: tl.constexpr):
    """Rows of storage that hold places of sequence b. rows: of a sequence if contiguous; PAGE: rows of a page, else 0."""
    if PAGE > 0:
        page = tl.load(table_ptr + b * width + place // PAGE, mask=seen, other=0).to(tl.int64)
        return page * PAGE + place % PAGE
    return b * rows + place


@triton.jit
def _append(
    k_ptr, v_ptr, key_ptr, value_ptr, pooled_ptr, length_ptr, table_ptr,
    tokens, capacity, slots, width, H: tl.constexpr, H_P: tl.constexpr, DIM: tl.constexpr, D: tl.constexpr,
    SIZE: tl.constexpr, SIZE_P: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + b)
    if length >= 0:
        end = tl.minimum(length + tokens, capacity)
        head, dim = tl.arange(0, H_P)[:, None], tl.arange(0, D)[None, :]
        here = (head < H) & (dim < DIM)
        for i in range(0, end - length):
            row = cache_rows(table_ptr, b, length + i, True, capacity, width, PAGE)
            source = ((b * tokens + i) * H + head) * DIM + dim
            target = (row * H + head) * DIM + dim
            put = here & (row >= 0)  # a page that no one assigned
            tl.store(key_ptr + target, tl.load(k_ptr + source, mask=here), mask=put)
            tl.store(value_ptr + target, tl.load(v_ptr + source, mask=here), mask=put)
        tl.debug_barrier()  # the other threads' keys, and everyone has read the length
        HALVES: tl.constexpr = 2 if SPLIT else 1
        for block in range(length // SIZE, end // SIZE):
            offset = tl.arange(0, SIZE_P)
            row = cache_rows(table_ptr, b, block * SIZE, True, capacity, width, PAGE) + offset
            pooled = cache_rows(table_ptr, b, block, True, slots, width, PAGE // SIZE)
            for h in range(H):
                keep = (offset < SIZE)[:, None] & (dim < DIM) & (pooled >= 0)
                key = tl.load(key_ptr + (row[:, None] * H + h) * DIM + dim, mask=keep, other=0.0)
                mean = tl.sum(key.to(tl.float32), 0) / SIZE
                column = tl.arange(0, D)
                target = pooled_ptr + (pooled * H + h) * HALVES * DIM + column
                high = mean.to(pooled_ptr.dtype.element_ty)
                put = (column < DIM) & (pooled >= 0)
                tl.store(target, high, mask=put)
                if SPLIT:
                    low = mean - high.to(tl.float32)
                    tl.store(target + DIM, low.to(pooled_ptr.dtype.element_ty), mask=put)
        tl.store(length_ptr + b, end)


def append(cache, k: Tensor, v: Tensor) -> None:
    """k, v [B, T, Hkv, D], contiguous; `cache` as in cache.py, checked by it."""
    heads, dim, size = cache.kv_heads, cache.head_dim, cache.block_size
    width = 0 if cache.page_table is None else cache.page_table.shape[1]
    _append[(cache.batch,)](
        k, v, cache.keys, cache.values, cache.pooled, cache.lengths, cache.page_table,
        k.shape[1], cache.capacity, cache.slots, width, heads, triton.next_power_of_2(heads), dim,
        max(16, triton.next_power_of_2(dim)), size, triton.next_power_of_2(size), cache.page_size,
        SPLIT=cache.pooled.shape[2] == 2, num_warps=1 if heads * dim <= 256 else 4,
    )  # fmt: skip
