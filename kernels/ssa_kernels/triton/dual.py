"""Both streams in one pass over key tiles: scores once, two online softmaxes, membership of the selection as bits.

The sparse weight of a key is the full weight where its block is selected, so one running maximum and one exponential
serve both streams. A row tile in which that maximum drowned a sparse sum is done again with the sparse stream's own. It
refuses nothing: `triton_backend.py` has prepared the arguments (contiguous, head dimension a power of two from 16, block
size a power of two from 16 to 128, every token a query).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssa_kernels.triton.dense import PAD, tiles
from ssa_kernels.triton.routing import LOG2E


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _bits(
    blocks_ptr, bits_ptr, n, words, h_kv: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr,
    WORD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Word w of a token: bit i is set when block w * WORD + i is selected. Layout [B, Hkv, words, N]."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    rows, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COUNT_P)
    at = ((b * n + rows)[:, None] * h_kv + h) * COUNT + column[None, :]
    block = tl.load(blocks_ptr + at, mask=(rows < n)[:, None] & (column < COUNT)[None, :], other=-1)
    for w in range(words):
        bit = block - w * WORD
        here = (block >= 0) & (bit >= 0) & (bit < 32)
        word = tl.reduce(tl.where(here, 1 << tl.where(here, bit, 0), 0), 1, _either)
        tl.store(bits_ptr + ((b * h_kv + h) * words + w) * n + rows, word, mask=rows < n)


@triton.jit
def _row_bits(
    bits_ptr, first, rows, s, n, SHIFT: tl.constexpr, WORD: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """Per row of one (batch row, KV head): the selection from the block of key `first` on, and where in it `first` lies.

    Bit `(rest + i) >> SHIFT` of the word is key `first + i`. `rest` is negative where the row's document begins later.
    """
    place = tl.maximum(first - s, 0) if HAS_DOCS else first
    block = place >> SHIFT
    word = (block // WORD).to(tl.int64) * n + rows
    bits = tl.load(bits_ptr + word, mask=rows < n, other=0) >> (block % WORD)
    rest = first - s - (block << SHIFT) if HAS_DOCS else s * 0
    return bits, rest


@triton.jit
def _chosen(bits, rest, step, SHIFT: tl.constexpr, HAS_DOCS: tl.constexpr):
    """Which of the keys `first + step` are selected; `_row_bits` gives bits and rest."""
    slot = (tl.maximum(rest + step, 0) if HAS_DOCS else step) >> SHIFT
    return ((bits >> slot) & 1) != 0


@triton.jit
def _key_range(doc_ptr, doc_at, rows, n, ROWS: tl.constexpr, KEYS: tl.constexpr, HAS_DOCS: tl.constexpr):
    """Document starts of the rows and of the last one; keys [low, high) any row sees; [inner, outer), whole tiles that
    every row sees, so that all rows are of the last one's document if there are any."""
    begin = tl.min(rows, 0)
    last = tl.minimum(begin + ROWS, n) - 1
    low, own = 0, 0
    s = rows * 0
    if HAS_DOCS:  # document starts ascend with the row
        s = tl.load(doc_ptr + doc_at + rows, mask=rows < n, other=0)
        low = tl.load(doc_ptr + doc_at + begin) // KEYS * KEYS
        own = tl.load(doc_ptr + doc_at + last)
    high = last + 1
    inner = tl.minimum(tl.cdiv(own, KEYS) * KEYS, high)
    return s, own, low, inner, tl.maximum((begin + 1) // KEYS * KEYS, inner), high


@triton.jit
def _forward_tiles(
    full, sparse, top, total, total_sparse, q, k_desc, v_desc, bits_ptr, b, h, low, high, rows, s, n, scale_log2,
    D: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr,
    SHIFT: tl.constexpr, WORD: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    step = tl.arange(0, KEYS)
    for first in range(low, high, KEYS):
        k = k_desc.load([b, first, h * D]).reshape(KEYS, D)
        bits, rest = _row_bits(bits_ptr, first, rows, s, n, SHIFT, WORD, HAS_DOCS)
        score = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        if MASKED:
            key = first + step
            seen = key[None, :] <= rows[:, None]
            if HAS_DOCS:
                seen = seen & (key[None, :] >= s[:, None])
            score = tl.where(seen, score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1) * scale_log2)
        safe = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score * scale_log2 - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        v = v_desc.load([b, first, h * D]).reshape(KEYS, D)
        full = tl.dot(weight.to(v.dtype), v, full * shrink[:, None], input_precision="tf32x3")
        chosen = _chosen(bits[:, None], rest[:, None] if MASKED else rest, step[None, :], SHIFT, HAS_DOCS)
        weight = tl.where(chosen, weight, 0.0)
        total_sparse = total_sparse * shrink + tl.sum(weight, 1)
        sparse = tl.dot(weight.to(v.dtype), v, sparse * shrink[:, None], input_precision="tf32x3")
        top = higher
    return full, sparse, top, total, total_sparse


@triton.jit
def _sparse_tiles(
    q, k_desc, v_desc, bits_ptr, b, h, low, high, rows, s, n, scale_log2,
    ROWS: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
    SHIFT: tl.constexpr, WORD: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """The sparse stream alone, with its own running maximum."""
    step = tl.arange(0, KEYS)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(low, high, KEYS):
        k = k_desc.load([b, first, h * D]).reshape(KEYS, D)
        v = v_desc.load([b, first, h * D]).reshape(KEYS, D)
        bits, rest = _row_bits(bits_ptr, first, rows, s, n, SHIFT, WORD, HAS_DOCS)
        key = first + step
        seen = _chosen(bits[:, None], rest[:, None], step[None, :], SHIFT, HAS_DOCS)
        seen = seen & (key[None, :] <= rows[:, None]) & (key[None, :] >= s[:, None])
        score = tl.where(seen, tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale_log2, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        shrink = tl.exp2(top - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = higher
    return acc, top, total


@triton.jit
def _forward(
    q_ptr, k_desc, v_desc, bits_ptr, doc_ptr, full_ptr, lse_full_ptr, sparse_ptr, lse_sparse_ptr,
    n, words, n_pad, scale_log2, h_q: tl.constexpr, h_kv: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, SHIFT: tl.constexpr, WORD: tl.constexpr, FLOOR: tl.constexpr, HAS_DOCS: tl.constexpr,
):  # fmt: skip
    """One program per (row tile, query head)."""
    head, b = tl.program_id(1), tl.program_id(2)
    h = head // (h_q // h_kv)
    rows = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS + tl.arange(0, ROWS)  # the longest rows start first
    real = rows < n
    s, own, low, inner, outer, high = _key_range(doc_ptr, b.to(tl.int64) * n, rows, n, ROWS, KEYS, HAS_DOCS)
    bits_ptr += (b.to(tl.int64) * h_kv + h) * words * n
    dim = tl.arange(0, D)
    row_at = (b.to(tl.int64) * n + rows) * h_q + head
    at = row_at[:, None] * D + dim[None, :]
    q = tl.load(q_ptr + at, mask=real[:, None], other=0.0)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    total_sparse = tl.zeros([ROWS], tl.float32)
    full = tl.zeros([ROWS, D], tl.float32)
    sparse = tl.zeros([ROWS, D], tl.float32)
    if HAS_DOCS:
        full, sparse, top, total, total_sparse = _forward_tiles(
            full, sparse, top, total, total_sparse, q, k_desc, v_desc, bits_ptr, b, h, low, inner, rows, s, n,
            scale_log2, D, KEYS, True, SHIFT, WORD, HAS_DOCS,
        )  # fmt: skip
    full, sparse, top, total, total_sparse = _forward_tiles(
        full, sparse, top, total, total_sparse, q, k_desc, v_desc, bits_ptr, b, h, inner, outer, rows, own, n,
        scale_log2, D, KEYS, False, SHIFT, WORD, HAS_DOCS,
    )  # fmt: skip
    full, sparse, top, total, total_sparse = _forward_tiles(
        full, sparse, top, total, total_sparse, q, k_desc, v_desc, bits_ptr, b, h, outer, high, rows, s, n,
        scale_log2, D, KEYS, True, SHIFT, WORD, HAS_DOCS,
    )  # fmt: skip
    tl.store(full_ptr + at, (full / total[:, None]).to(full_ptr.dtype.element_ty), mask=real[:, None])
    lse_at = (b.to(tl.int64) * h_q + head) * n_pad + rows
    tl.store(lse_full_ptr + lse_at, top + tl.log2(total), mask=real)
    if tl.min(tl.where(real, total_sparse, 1.0), 0) < FLOOR:
        sparse, top, total_sparse = _sparse_tiles(
            q, k_desc, v_desc, bits_ptr, b, h, low, high, rows, s, n, scale_log2,
            ROWS, D, KEYS, SHIFT, WORD, HAS_DOCS,
        )  # fmt: skip
    seen = total_sparse > 0  # a row whose selection is empty gives zeros
    lse = tl.where(seen, top + tl.log2(total_sparse), float("inf"))
    sparse = sparse / tl.where(seen, total_sparse, 1.0)[:, None]
    tl.store(sparse_ptr + at, sparse.to(sparse_ptr.dtype.element_ty), mask=real[:, None])
    tl.store(lse_sparse_ptr + row_at, lse, mask=real)


def selection_bits(blocks: Tensor, n: int, size: int, doc_starts: Tensor | None) -> tuple[Tensor, int]:
    """int32 [B, Hkv, words, N] and the blocks between two words' first bits.

    One bit a (token, block): the selection itself at 8k tokens in blocks of 16. With documents, whose blocks begin
    anywhere in a key tile, words overlap by half, so that a tile's blocks are always in one.
    """
    batch, _, h_kv, count = blocks.shape
    word = 32 if doc_starts is None else 16
    words = triton.cdiv(triton.cdiv(n, size), word)
    bits = torch.empty(batch, h_kv, words, n, dtype=torch.int32, device=blocks.device)
    _bits[(triton.cdiv(n, 128), h_kv, batch)](
        blocks, bits, n, words, h_kv, count, triton.next_power_of_2(count), word, 128
    )
    return bits, word


def forward(q, k, v, bits: Tensor, word: int, size: int, scale: float, doc_starts, config):
    """o_full, lse_full, o_sparse, lse_sparse: [B, N, Hq, D] in q's dtype, and log2-sum-exp2 in fp32, of the full stream
    [B, Hq, N padded] as triton_dense.py lays it out, of the sparse one [B, N, Hq] as triton_sparse.py does."""
    batch, n, h_q, dim = q.shape
    n_pad = triton.cdiv(n, PAD) * PAD
    full, sparse = torch.empty_like(q), torch.empty_like(q)
    lse_full = torch.full((batch, h_q, n_pad), float("inf"), dtype=torch.float32, device=q.device)
    lse_sparse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    rows, keys, warps, stages = config.dual_forward
    # A sum below this has lost weights to underflow: fp32's and bf16's smallest is 2^-126, fp16's 2^-14.
    floor = 2.0**-4 if q.dtype == torch.float16 else 2.0**-100
    _forward[(triton.cdiv(n, rows), h_q, batch)](
        q, tiles(k, keys), tiles(v, keys), bits, doc_starts, full, lse_full, sparse, lse_sparse,
        n, bits.shape[2], n_pad, scale * LOG2E, h_q, k.shape[2], dim, rows, keys, size.bit_length() - 1, word, floor,
        HAS_DOCS=doc_starts is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return full, lse_full, sparse, lse_sparse
