"""Exact streaming top-k for the rows of a tile: scores that beat a row's threshold are appended to the row's list in
scratch memory, and long lists are cut to their best by bisection.

A list is (key int32, slot int32) in ascending slot order, so what is kept is a compaction, nothing is ever sorted, and ties
go to the lower slot. A threshold rises only when lists are cut: for scores in random order that is about once for every
doubling of the length. It refuses nothing.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-0x80000000)
HIGHEST = tl.constexpr(0x7FFFFFFF)
CHUNK = tl.constexpr(64)  # entries of each list that are moved at once
SEARCH = tl.constexpr(128)  # entries of each list that are searched at once


@triton.jit
def ordered(score):
    """int32 keys that order as the fp32 scores do."""
    bits = score.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _rank(chosen):
    """For each chosen entry of [ROWS, WIDTH], how many of its row are chosen up to it.

    A product with a triangle of ones: exact, and a scan would move the tile between threads first.
    """
    column = tl.arange(0, chosen.shape[1])
    ones = tl.where(column[:, None] <= column[None, :], 1.0, 0.0).to(tl.float16)
    rank = tl.dot(tl.where(chosen, 1.0, 0.0).to(tl.float16), ones)
    return (rank + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000  # 2**23: cheaper than a conversion


@triton.jit
def append(key_ptr, slot_ptr, key, slot, enters, held, CAPACITY: tl.constexpr):
    """Add the entries of a tile [ROWS, TILE] that enter to their rows' lists; returns the new lengths."""
    row = tl.arange(0, key.shape[0])[:, None]
    # One int32 tensor says all: it is what moves between threads before the stores.
    at = tl.where(enters, row * CAPACITY + (held - 1)[:, None] + _rank(enters), -1).to(tl.int64)
    tl.store(key_ptr + at, key, mask=at >= 0)
    tl.store(slot_ptr + at, slot, mask=at >= 0)
    return held + tl.sum(enters.to(tl.int32), 1)


@triton.jit
def read(key_ptr, slot_ptr, first, held, low, high, CAPACITY: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """WIDTH entries of every list: keys, slots, and which are entries (if PART: with a slot in [low, high))."""
    place = (first + tl.arange(0, WIDTH))[None, :]
    at = tl.arange(0, held.shape[0])[:, None] * CAPACITY + place
    member = place < held[:, None]
    key = tl.load(key_ptr + at, mask=member, other=LOWEST)
    slot = tl.load(slot_ptr + at, mask=member, other=0)
    if PART:
        member = member & (slot >= low[:, None]) & (slot < high[:, None])
    return key, slot, member


@triton.jit
def _boundary(key_ptr, slot_ptr, held, low, high, keep, spare, CAPACITY: tl.constexpr, PART: tl.constexpr):
    """A key, and the number of entries equal to it, which with all above it are a row's `keep` to `keep + spare` best."""
    most = tl.max(held, 0)
    key, _, member = read(key_ptr, slot_ptr, 0, held, low, high, CAPACITY, SEARCH, PART)
    least = tl.min(tl.where(member, key, HIGHEST), 1)
    key = tl.where(member, key, LOWEST)
    best = tl.max(key, 1)
    size = tl.sum(member.to(tl.int32), 1)
    if CAPACITY > SEARCH:
        for first in range(SEARCH, most, SEARCH):
            more, _, belongs = read(key_ptr, slot_ptr, first, held, low, high, CAPACITY, SEARCH, PART)
            least = tl.minimum(least, tl.min(tl.where(belongs, more, HIGHEST), 1))
            best = tl.maximum(best, tl.max(tl.where(belongs, more, LOWEST), 1))
            size += tl.sum(belongs.to(tl.int32), 1)
    least = tl.where(size < keep, LOWEST, least)
    best = tl.where(size <= keep + spare, least, best)
    above = tl.zeros([held.shape[0]], tl.int32)  # entries known to exceed `best`
    while tl.max((least < best).to(tl.int32), 0) > 0:  # at least `keep` entries reach `least`, fewer exceed `best`
        middle = (least | best) - ((least ^ best) >> 1)  # the mean, rounded up, without overflow
        count = tl.sum((key >= middle[:, None]).to(tl.int32), 1)
        if CAPACITY > SEARCH:
            for first in range(SEARCH, most, SEARCH):
                more, _, belongs = read(key_ptr, slot_ptr, first, held, low, high, CAPACITY, SEARCH, PART)
                count += tl.sum((belongs & (more >= middle[:, None])).to(tl.int32), 1)
        searched = least < best
        above = tl.where(searched & (count < keep), count, above)
        best = tl.where(searched & (count < keep), middle - 1, best)
        least = tl.where(searched & (count >= keep), middle, least)
        best = tl.where((count >= keep) & (count <= keep + spare), least, best)
    return least, keep + spare - above


@triton.jit
def cut(key_ptr, slot_ptr, held, low, high, keep, spare, CAPACITY: tl.constexpr, PART: tl.constexpr):
    """Keep the `keep`, or up to `spare` more, best entries (if PART: of those with a slot in [low, high), and all others).

    Returns the key a later entry must exceed, LOWEST where fewer than `keep` were there, and the new lengths.
    """
    tl.debug_barrier()  # what any thread appended is visible to all
    least, equal = _boundary(key_ptr, slot_ptr, held, low, high, keep, spare, CAPACITY, PART)
    kept = tl.zeros([held.shape[0]], tl.int32)
    for first in range(0, tl.max(held, 0), CHUNK):
        key, slot, member = read(key_ptr, slot_ptr, first, held, low, high, CAPACITY, CHUNK, PART)
        same = member & (key == least[:, None])
        stays = (member & (key > least[:, None])) | (same & (_rank(same) <= equal[:, None]))
        equal -= tl.sum(same.to(tl.int32), 1)
        if PART:
            stays = stays | ((first + tl.arange(0, CHUNK)[None, :] < held[:, None]) & (member == 0))
        tl.debug_barrier()  # all have read the chunk: its places may be overwritten
        kept = append(key_ptr, slot_ptr, key, slot, stays, kept, CAPACITY)
    tl.debug_barrier()
    return least, kept
