"""The attention streams of an exported model: routing, and attention to all keys, selected blocks, pooled blocks, a window.

Sparse attention selects, for each token and key/value head, its own block of keys and the best `block_count - 1` complete
blocks before it, exactly as in training. Queries are computed in chunks, so that memory grows with the length, not its
square. It refuses nothing: modeling_ssa.py has prepared the arguments. This file is copied into exported folders: torch only.

Shapes: B rows, T new tokens, N tokens seen so far (cache included), H query heads, K key/value heads, G = H / K, D head
dim, M blocks, S blocks selected. `start_b` is the index of each row's first real token, or None when no row is padded.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from .positions_ssa import wide

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CHUNK_ELEMENTS = 1 << 24
"""Elements of the largest temporary of one chunk of queries; bounds memory at any length."""


def best_blocks(score, count):
    """Indices of the `count` highest non-negative scores of the last axis, ties to the lower index; -1 for none."""
    value, index = score.sort(dim=-1, descending=True, stable=True)
    index = torch.where(value >= 0, index, -1)[..., :count]
    return F.pad(index, (0, count - index.shape[-1]), value=-1)


def group_scores(q_bkgtd, pooled_bkmd, position_bt, block_size):
    """[B, K, T, M]: each earlier block's probability among the complete ones, summed over the group; -1 for the others."""
    index = torch.arange(pooled_bkmd.shape[2], device=q_bkgtd.device)
    complete = (index + 1) * block_size <= position_bt[..., None] + 1  # [B, T, M]
    score = torch.einsum("bkgtd,bkmd->bkgtm", wide(q_bkgtd), pooled_bkmd)
    score = score.masked_fill(~complete[:, None, None], float("-inf")).softmax(-1).sum(2)
    candidate = index < position_bt[..., None] // block_size
    return score.masked_fill(~candidate[:, None], -1.0)  # also clears the NaN of tokens without any complete block


@torch.no_grad()
def select_blocks(q_bkgtd, pooled_bkmd, position_bt, config, block_count, scores=group_scores):
    """Block numbers [B, K, T, S], own block first, -1 where there is none; q is already scaled."""
    batch, heads, _, tokens, _ = q_bkgtd.shape
    own = (position_bt // config.block_size)[:, None].expand(batch, heads, tokens)
    blocks = pooled_bkmd.shape[2]
    if block_count == 1 or blocks == 0:
        return own[..., None]
    index = torch.arange(blocks, device=own.device)
    score = scores(q_bkgtd, pooled_bkmd, position_bt, config.block_size)
    chosen = best_blocks(score, min(block_count - 1, blocks))
    # the reference kernel keeps the best 8 of the earlier chunks and the best of the current chunk of 16
    if config.topk == "reference":
        edge = own[..., None] // 16 * 16
        parts = (
            best_blocks(score.masked_fill(index >= edge, -1.0), 8),
            best_blocks(score.masked_fill(index < edge, -1.0), 7),
        )
        chosen = F.pad(chosen, (0, max(0, 15 - chosen.shape[-1])), value=-1)
        parts = F.pad(torch.cat(parts, -1), (0, chosen.shape[-1] - 15), value=-1)
        chosen = torch.where(edge > 0, parts, chosen)
    return torch.cat((own[..., None], chosen), -1)


def chunk_size(x, elements_per_token):
    """Queries of a chunk. Four times as many on a GPU, where launches and not memory are scarce."""
    return CHUNK_ELEMENTS * (1 if x.device.type == "cpu" else 4) // elements_per_token


def in_chunks(function, tokens, size):
    """Run function(slice) over `size` of the T queries at a time and join along T; recomputed in backward."""
    size = max(1, size)
    parts = [slice(t, min(t + size, tokens)) for t in range(0, tokens, size)]
    if torch.is_grad_enabled():
        outputs = [checkpoint(function, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    else:
        outputs = [function(part) for part in parts]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def grouped_attention(q, k, v, mask_bts):
    """q [B, H, T, D] over k, v [B, K, n, D], mask [B, T, n] (None: everything seen); keys are not repeated per head."""
    batch, heads, tokens, dim = q.shape
    group = heads // k.shape[1]
    folded = q.reshape(batch, k.shape[1], group * tokens, dim)
    mask = None if mask_bts is None else mask_bts.repeat(1, group, 1)[:, None]
    # cuDNN's attention makes a plan for every shape it has not seen, and each decoding step brings a new length
    with sdpa_kernel(WITHOUT_PLANS) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(folded, k, v, attn_mask=mask).reshape(batch, heads, tokens, dim)


def full_stream(q, k, v, position_bt, start_b):
    """Causal attention, [B, H, T, D]."""
    batch, heads, tokens, _ = q.shape
    total, group = k.shape[2], heads // k.shape[1]
    if start_b is None and tokens == 1:
        return grouped_attention(q, k, v, None)
    if start_b is None and tokens == total:
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    index = torch.arange(total, device=q.device) - (
        0 if start_b is None else start_b[:, None]
    )  # the row's own positions

    def chunk(part):
        seen = (index[..., None, :] >= 0) & (index[..., None, :] <= position_bt[:, part, None])
        return grouped_attention(q[:, :, part], k, v, seen)

    return in_chunks(chunk, tokens, chunk_size(q, batch * heads * total))


def sparse_stream(q, k, v, pooled_k, position_bt, start_b, config, block_count, kernels=None):
    """Attention to the selected blocks, [B, H, T, D]; gathers S blocks a query, so only routing grows with N.

    kernels: (group_scores, attend) in place of this file's, as triton_ssa.py has them.
    """
    batch, heads, tokens, dim = q.shape
    kv_heads, total, size = k.shape[1], k.shape[2], config.block_size
    if block_count * size >= total and config.topk == "exact":
        return full_stream(q, k, v, position_bt, start_b)
    row = torch.arange(batch, device=q.device)[:, None, None, None]
    head = torch.arange(kv_heads, device=q.device)[:, None, None]
    scaled = (q * dim**-0.5).view(batch, kv_heads, heads // kv_heads, tokens, dim)

    def chunk(part):
        q_part, position = scaled[:, :, :, part], position_bt[:, part]
        if kernels is not None:
            blocks = select_blocks(q_part, pooled_k, position, config, block_count, kernels[0])
            return kernels[1](q_part, k, v, blocks, position, start_b, size)
        blocks = select_blocks(q_part, pooled_k, position, config, block_count)
        index = blocks[..., None] * size + torch.arange(size, device=q.device)
        seen = ((index >= 0) & (index <= position[:, None, :, None, None])).flatten(3)  # [B, K, T, S * size]
        index = index.flatten(3) if start_b is None else index.flatten(3) + start_b[:, None, None, None]
        index = index.clamp(0, total - 1)
        score = torch.einsum("bkgtd,bktsd->bkgts", q_part, k[row, head, index])
        weight = wide(score).masked_fill(~seen[:, :, None], float("-inf")).softmax(-1).to(v.dtype)
        return torch.einsum("bkgts,bktsd->bkgtd", weight, v[row, head, index]).flatten(1, 2)

    per_token = batch * max(kv_heads * block_count * size * dim, heads * pooled_k.shape[2])
    if kernels is not None:  # the scores of every block and their order are all that is kept
        per_token = batch * kv_heads * max(4 * pooled_k.shape[2], block_count)
    return in_chunks(chunk, tokens, chunk_size(q, per_token))


def compressed_stream(q, pooled_k, pooled_v, position_bt, config):
    """Attention to the pooled keys and values of the complete blocks, zero where there is none, [B, H, T, D]."""
    batch, heads, tokens, _ = q.shape
    blocks = pooled_k.shape[2]
    if blocks == 0:
        return torch.zeros_like(q)
    pooled_k, pooled_v = pooled_k.to(q.dtype), pooled_v.to(q.dtype)
    complete_at = (torch.arange(blocks, device=q.device) + 1) * config.block_size - 1

    def chunk(part):
        complete = complete_at <= position_bt[:, part, None]
        some = complete[..., :1]
        out = grouped_attention(q[:, :, part], pooled_k, pooled_v, complete | ~some)
        return torch.where(some[:, None], out, 0.0)

    return in_chunks(chunk, tokens, chunk_size(q, batch * heads * blocks))


def window_stream(q, k, v, position_bt, start_b, window):
    """Causal attention over the last `window` tokens, own included, [B, H, T, D]."""
    tokens, total = q.shape[2], k.shape[2]
    index = torch.arange(total, device=q.device) - (0 if start_b is None else start_b[:, None])
    past = total - tokens

    def chunk(part):
        first = max(0, past + part.start - window + 1)
        keys = slice(first, past + part.stop)
        where, at = index[..., None, keys], position_bt[:, part, None]
        seen = (where <= at) & (where > at - window) & (where >= 0)
        return grouped_attention(q[:, :, part], k[:, :, keys], v[:, :, keys], seen)

    return in_chunks(chunk, tokens, max(window, 64))  # a chunk sees window + chunk keys
