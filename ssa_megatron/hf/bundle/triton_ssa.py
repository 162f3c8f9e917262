"""Sparse attention of an exported model on an NVIDIA GPU: the routing's group scores, and attention to the selected blocks.

Forward only, for prompts and cached steps alike; what it gives is what attention_ssa.py's PyTorch gives, to rounding. Keys are
read where they lie (any strides of the first three axes, padded rows too), so no gathered copy of them is made. It refuses
nothing: `serves` says which tensors it takes, and attention_ssa.py computes all others. This file is copied into exported
folders: torch and triton only, and triton is imported on a GPU only.

Shapes: B rows, T new tokens, N tokens seen so far, K key/value heads, G query heads of each, D head dim, M pooled blocks,
S blocks selected; `start_b` is the index of each row's first real token, or None when no row is padded.
"""

import torch

try:  # transformers demands every package that a file imports outside of `try`, also where there is no GPU
    import triton
    import triton.language as tl
except ImportError:
    raise

NEVER = -1.0  # score of a block that is no candidate; sums of probabilities are not negative
TILE_ELEMENTS = (
    4096  # of queries, and of pooled keys, at once: 48 KB of an RTX's 99 KB of shared memory, 82 of an H100's 227
)


def serves(q_bhtd, k_bknd, v_bknd):
    """Whether these kernels take the three, which lie on a GPU: its kind, their dtype, strides, and what fits on chip."""
    if torch.version.hip is not None or torch.cuda.get_device_capability(q_bhtd.device) < (8, 0):
        return False
    if q_bhtd.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    group_p, dim_p = _sizes(q_bhtd.shape[1] // k_bknd.shape[1], q_bhtd.shape[3])
    unit_stride = all(x.stride(3) == 1 for x in (q_bhtd, k_bknd, v_bknd))
    return unit_stride and dim_p <= 256 and group_p * dim_p <= 2 * TILE_ELEMENTS


@triton.jit
def _logits(
    q_ptr, pooled_ptr, token, head, real, first, complete, q_head, q_token, pooled_block,
    D: tl.constexpr, D_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """fp32 [ROWS, TILE] of pooled blocks first .. first + TILE, -inf where a row's block is not complete."""
    dim, block = tl.arange(0, D_P), first + tl.arange(0, TILE)
    q_at = head[:, None] * q_head + token[:, None].to(tl.int64) * q_token + dim[None, :]
    q = tl.load(q_ptr + q_at, mask=real[:, None] & (dim < D)[None, :], other=0.0).to(tl.float32)
    seen = block[None, :] < complete[:, None]
    some = (block < tl.max(complete, 0))[None, :] & (dim < D)[:, None]
    pooled_t = tl.load(pooled_ptr + block[None, :].to(tl.int64) * pooled_block + dim[:, None], mask=some, other=0.0)
    return tl.where(seen, tl.dot(q, pooled_t, input_precision="tf32x3"), -float("inf"))


@triton.jit
def _rows(position_ptr, position_row, b, T, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr):
    """Of a program's TOKENS * GROUP_P rows: token, head of the group, which are real, and the position of each."""
    row = tl.arange(0, TOKENS * GROUP_P)
    token, head = tl.program_id(0) * TOKENS + row // GROUP_P, row % GROUP_P
    real = (token < T) & (head < GROUP)
    position = tl.load(position_ptr + b * position_row + token, mask=token < T, other=-1).to(tl.int32)
    return token, head, real, position


@triton.jit(do_not_specialize=["T"])  # lengths change from call to call and must not compile anew
def _statistics(
    q_ptr, pooled_ptr, position_ptr, lse_ptr,
    q_batch, q_group, q_head, q_token, pooled_batch, pooled_head, pooled_block, position_row, T,
    SIZE: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, D_P: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """log of the softmax's denominator of each (token, head), [B, K, T, GROUP_P]."""
    h, b, heads = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    token, head, real, position = _rows(position_ptr, position_row, b, T, GROUP, GROUP_P, TOKENS)
    complete = (position + 1) // SIZE
    q_ptr += b * q_batch + h * q_group
    pooled_ptr += b * pooled_batch + h * pooled_head
    top = tl.full([TOKENS * GROUP_P], -float("inf"), tl.float32)
    total = tl.zeros([TOKENS * GROUP_P], tl.float32)
    for first in range(0, tl.max(complete, 0), TILE):
        score = _logits(
            q_ptr, pooled_ptr, token, head, real, first, complete, q_head, q_token, pooled_block, D, D_P, TILE
        )
        higher = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(score - safe[:, None]), 1)
        top = higher
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), float("inf"))
    tl.store(lse_ptr + ((b * heads + h) * T + token) * GROUP_P + head, lse, mask=token < T)


@triton.jit(do_not_specialize=["T", "M"])
def _scores(
    q_ptr, pooled_ptr, position_ptr, lse_ptr, score_ptr,
    q_batch, q_group, q_head, q_token, pooled_batch, pooled_head, pooled_block, position_row, T, M, heads,
    SIZE: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, D_P: tl.constexpr, TILE: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    """Sum over the group's heads of each block's probability, NONE from the token's own block on, [B, K, T, M]."""
    b, h = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2).to(tl.int64) % heads
    token, head, real, position = _rows(position_ptr, position_row, b, T, GROUP, GROUP_P, TOKENS)
    first, complete = tl.program_id(1) * TILE, (position + 1) // SIZE
    q_ptr += b * q_batch + h * q_group
    pooled_ptr += b * pooled_batch + h * pooled_head
    score = _logits(q_ptr, pooled_ptr, token, head, real, first, complete, q_head, q_token, pooled_block, D, D_P, TILE)
    lse = tl.load(lse_ptr + ((b * heads + h) * T + token) * GROUP_P + head, mask=real, other=float("inf"))
    share = tl.sum(tl.reshape(tl.exp(score - lse[:, None]), [TOKENS, GROUP_P, TILE]), 1)
    one, block = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), first + tl.arange(0, TILE)
    at = tl.load(position_ptr + b * position_row + one, mask=one < T, other=-1).to(tl.int32)
    share = tl.where(block[None, :] < (at // SIZE)[:, None], share, NONE)
    place = ((b * heads + h) * T + one)[:, None] * M + block[None, :]
    tl.store(score_ptr + place, share, mask=(one < T)[:, None] & (block < M)[None, :])


@triton.jit(do_not_specialize=["T"])
def _attend(
    q_ptr, k_ptr, v_ptr, block_ptr, position_ptr, start_ptr, out_ptr,
    q_batch, q_group, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, position_row, T, COUNT,
    SIZE: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, D: tl.constexpr, D_P: tl.constexpr,
    KEYS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One token and key/value head a program; KEYS selected keys a step."""
    token, h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    heads, head, dim = tl.num_programs(1), tl.arange(0, GROUP_P), tl.arange(0, D_P)
    real = (head < GROUP)[:, None] & (dim < D)[None, :]
    position = tl.load(position_ptr + b * position_row + token).to(tl.int32)
    start = tl.load(start_ptr + b) if PADDED else 0
    q_at = b * q_batch + h * q_group + head[:, None] * q_head + token * q_token + dim[None, :]
    q = tl.load(q_ptr + q_at, mask=real, other=0.0)
    k_ptr += b * k_batch + h * k_head
    v_ptr += b * v_batch + h * v_head
    block_ptr += ((b * heads + h) * T + token) * COUNT
    top = tl.full([GROUP_P], -float("inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    acc = tl.zeros([GROUP_P, D_P], tl.float32)
    for first in range(0, COUNT * SIZE, KEYS):
        i = first + tl.arange(0, KEYS)
        block = tl.load(block_ptr + i // SIZE, mask=i < COUNT * SIZE, other=-1).to(tl.int64)
        key = block * SIZE + i % SIZE
        seen = (block >= 0) & (key <= position)
        key += start
        k_t = tl.load(k_ptr + key[None, :] * k_token + dim[:, None], mask=seen[None, :] & (dim < D)[:, None], other=0.0)
        v = tl.load(v_ptr + key[:, None] * v_token + dim[None, :], mask=seen[:, None] & (dim < D)[None, :], other=0.0)
        score = tl.where(seen[None, :], tl.dot(q, k_t, input_precision="tf32x3"), -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))  # finite from the first step on: the own block comes first
        shrink, weight = tl.exp(top - higher), tl.exp(score - higher[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * shrink[:, None], input_precision="tf32x3")
        top = higher
    out_at = ((b * heads + h) * GROUP + head[:, None]) * (T * D) + token * D + dim[None, :]
    tl.store(out_ptr + out_at, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=real)


def _sizes(group, dim):
    """(heads of a group, head dim) as powers of two, the smallest that a tensor core's product takes."""
    return triton.next_power_of_2(group), max(16, triton.next_power_of_2(dim))


def group_scores(q_bkgtd, pooled_bkmd, position_bt, block_size):
    """fp32 [B, K, T, M]: sum over the group of each earlier block's probability among the complete ones, else NEVER.

    q is already scaled; pooled is fp32; position [1 or B, T].
    """
    (batch, heads, group, tokens, dim), blocks = q_bkgtd.shape, pooled_bkmd.shape[2]
    group_p, dim_p = _sizes(group, dim)
    tile = min(64, TILE_ELEMENTS // dim_p)
    rows = max(16, group_p, min(tile, group_p * triton.next_power_of_2(tokens)))
    per_program = rows // group_p
    lse = q_bkgtd.new_empty(batch, heads, tokens, group_p, dtype=torch.float32)
    scores = q_bkgtd.new_empty(batch, heads, tokens, blocks, dtype=torch.float32)
    strides = (*q_bkgtd.stride()[:4], *pooled_bkmd.stride()[:3], _row(position_bt))
    sizes = (block_size, group, group_p, per_program, dim, dim_p, tile)
    inputs, grid = (q_bkgtd, pooled_bkmd, position_bt, lse), triton.cdiv(tokens, per_program)
    with torch.cuda.device_of(q_bkgtd):  # Triton launches on the current device, which under device_map is another one
        _statistics[(grid, heads, batch)](*inputs, *strides, tokens, *sizes, num_stages=2)
        _scores[(grid, triton.cdiv(blocks, tile), batch * heads)](
            *inputs, scores, *strides, tokens, blocks, heads, *sizes, NEVER
        )
    return scores


def attend(q_bkgtd, k_bknd, v_bknd, blocks_bkts, position_bt, start_b, block_size):
    """[B, H, T, D]: softmax attention to the tokens of the blocks (own first, -1 none) up to the token's own. q is scaled."""
    batch, heads, group, tokens, dim = q_bkgtd.shape
    group_p, dim_p = _sizes(group, dim)
    group_p, wide = max(16, group_p), q_bkgtd.dtype == torch.float32
    warps = max(1, min(8, group_p * dim_p // (512 if wide else 1024)))
    out = q_bkgtd.new_empty(batch, heads * group, tokens, dim)
    blocks = blocks_bkts.contiguous()
    with torch.cuda.device_of(q_bkgtd):
        _attend[(tokens, heads, batch)](
            q_bkgtd, k_bknd, v_bknd, blocks, position_bt, start_b, out,
            *q_bkgtd.stride()[:4], *k_bknd.stride()[:3], *v_bknd.stride()[:3],
            _row(position_bt), tokens, blocks.shape[3], block_size, group, group_p, dim, dim_p,
            64 if dim_p <= 64 and not wide else 32, start_b is not None, num_warps=warps, num_stages=2,
        )  # fmt: skip
    return out


def _row(position_bt):
    """Stride from one row's positions to the next's; one row of them serves all."""
    return 0 if position_bt.shape[0] == 1 else position_bt.stride(0)
