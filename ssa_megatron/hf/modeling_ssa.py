"""SSA language model for transformers: a Llama block with a gate per query head, run in full or sparse attention.

Sparse attention selects, for each token and key/value head, its own block of keys and the best `block_count - 1`
complete blocks before it, exactly as in training; a cached step gives what the whole sequence at once gives, and a
left-padded row what it gives alone, because blocks and positions are counted from the row's first real token. It
refuses attention masks with holes, caches other than transformers' DynamicCache and unknown modes. This file is copied
into exported folders: torch and transformers only.

Shapes: B rows, T new tokens, N tokens seen so far (cache included), H query heads, K key/value heads, G = H / K, D head
dim, M blocks, S blocks selected. `start_b` is the index of each row's first real token, or None when no row is padded.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_ssa import MODES, SSAConfig, check_choice

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What this transformers calls the cache: `cache` in 5.24, whose generate() hands it to a forward by no other name."""
CHUNK_ELEMENTS = 1 << 24
"""Elements of the largest temporary of one chunk of queries; bounds memory at any length."""


def wide(x):
    """fp32 for fp32 and narrower, fp64 for fp64: the precision of norms, rotations, gates and routing."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------ positions
def row_starts(attention_mask):
    """[B] index of each row's first real token, or None when no row is padded on the left. Padding may also follow."""
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, tokens], got {tuple(attention_mask.shape)}")
    real = attention_mask.bool()
    seen = real.long().cumsum(-1)
    start = (seen == 0).sum(-1)
    holes = real & (seen != torch.arange(1, real.shape[1] + 1, device=real.device) - start[:, None])
    if bool(holes.any()):
        raise ValueError("attention_mask has a hole between real tokens: pad batches on the left before generating")
    start = start.clamp(max=real.shape[1] - 1)
    return start if bool(start.any()) else None


def rotary_frequencies(config, dtype, device):
    """(radians per token [D / 2], factor of cos and sin), by transformers' formulas of each RoPE type."""
    rope = config.rope_parameters
    exponent = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequency = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: long wavelengths, stretched by `factor`; 1: short, kept
        return (1 - kept) * frequency / rope["factor"] + kept * frequency, 1.0
    if rope["rope_type"] == "yarn":
        context = rope.get("original_max_position_embeddings") or config.max_position_embeddings

        def channel(turns):  # the one that turns so often in the original context
            return config.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

        first, last = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.head_dim - 1)
        index = torch.arange(config.head_dim // 2, dtype=dtype, device=device)
        stretched = ((index - first) / ((last - first) or 0.001)).clamp(0, 1)
        factor = rope["factor"]
        size = rope.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
        return stretched * frequency / factor + (1 - stretched) * frequency, size
    return frequency, 1.0


def rotary_table(position_bt, config, dtype):
    """cos and sin [B, 1, T, D] of the half-rotation form, computed in `dtype` (fp32 or wider)."""
    frequency, size = rotary_frequencies(config, dtype, position_bt.device)
    angle = position_bt.to(dtype)[..., None] * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos() * size, angle.sin() * size


def rotate(x, table):
    """x [B, heads, T, D]."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------- cache
def pool_blocks(x_bknd, first_block, count, block_size, start_b):
    """Means [B, K, count, D] (fp32 or wider) of blocks first_block .. first_block + count - 1 of each row.

    `first_block` is an int, or [B] with `start_b`. Blocks that are not complete come back as finite numbers without
    meaning.
    """
    batch, heads, tokens, dim = x_bknd.shape
    if start_b is None:
        x = x_bknd[:, :, first_block * block_size : (first_block + count) * block_size]
        return wide(x).reshape(batch, heads, count, block_size, dim).mean(3)
    first = torch.as_tensor(first_block, device=x_bknd.device) * block_size + start_b
    index = first[:, None] + torch.arange(count * block_size, device=x_bknd.device)
    index = index.clamp(max=tokens - 1)[:, None, :, None].expand(-1, heads, -1, dim)
    return wide(x_bknd.gather(2, index)).reshape(batch, heads, count, block_size, dim).mean(3)


class SSALayer(DynamicLayer):
    """One layer's cache: keys and values, and the pooled keys (nsa: and values) of the blocks completed so far.

    Keys and values live in buffers with room to grow, so a step copies its own tokens and not the history; pooling
    touches only the blocks that the new tokens complete. Everything transformers does to a cache (beam reordering,
    cropping, repeating, selecting rows, resetting) keeps the three in step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__()
        self._forget()

    def _forget(self):
        self.keys = self.values = self.room = self.pooled = self.start_b = None
        self.pooled_tokens, self.is_initialized = 0, False

    def update(self, key_states, value_states, *args, **kwargs):
        """Append [B, K, T, D]; returns all keys and values, [B, K, N, D]."""
        old, new = self.get_seq_length(), self.get_seq_length() + key_states.shape[2]
        if old == 0:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states, value_states
        elif torch.is_grad_enabled() and (key_states.requires_grad or self.keys.requires_grad):
            self.keys = torch.cat(
                (self.keys, key_states), 2
            )  # writing into a buffer would break autograd's saved tensors
            self.values = torch.cat((self.values, value_states), 2)
        else:
            if self.room is None or self.room[0].shape[2] < new or self.room[0].data_ptr() != self.keys.data_ptr():
                shape = (*self.keys.shape[:2], new + max(64, new // 8), self.keys.shape[3])
                self.room = self.keys.new_empty(shape), self.values.new_empty(shape)
                self.room[0][:, :, :old], self.room[1][:, :, :old] = self.keys, self.values
            self.room[0][:, :, old:new], self.room[1][:, :, old:new] = key_states, value_states
            self.keys, self.values = self.room[0][:, :, :new], self.room[1][:, :, :new]
        return self.keys, self.values

    def pool(self, block_size, start_b, with_values):
        """(pooled keys, pooled values or None), [B, K, M, D]; blocks not complete in a row have no meaning."""
        old, new = self.pooled_tokens, self.get_seq_length()
        sources = (self.keys, self.values) if with_values else (self.keys,)
        if self.pooled is None:
            self.pooled = tuple(wide(x[:, :, :0]) for x in sources)
        if start_b is None:
            first, last = old // block_size, new // block_size
            if last > first:
                fresh = (pool_blocks(x, first, last - first, block_size, None) for x in sources)
                self.pooled = tuple(torch.cat((p[:, :, :first], f), 2) for p, f in zip(self.pooled, fresh, strict=True))
        else:
            # Rows complete different blocks. Each rewrites the few that may have become complete, in its own place.
            first = (old - start_b).clamp(min=0) // block_size
            count, capacity = (new - old) // block_size + 1, new // block_size + 1
            at = (first[:, None] + torch.arange(count, device=first.device))[:, None, :, None]
            grown = []
            for p, x in zip(self.pooled, sources, strict=True):
                p = F.pad(p, (0, 0, 0, max(0, capacity - p.shape[2])))
                fresh = pool_blocks(x, first, count, block_size, start_b)
                grown.append(p.scatter(2, at.expand_as(fresh), fresh))
            self.pooled = tuple(grown)
        self.pooled_tokens = new
        return self.pooled[0], (self.pooled[1] if with_values else None)

    def _map_rows(self, change):
        self.room = None
        if self.pooled is not None:
            self.pooled = tuple(change(p) for p in self.pooled)
        if self.start_b is not None:
            self.start_b = change(self.start_b)

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._map_rows(lambda x: x[indices.to(x.device)])

    def crop(self, *args, **kwargs):
        super().crop(
            *args, **kwargs
        )  # the sign's meaning differs between transformers 4 and 5; only the result matters here
        self.pooled_tokens = min(self.pooled_tokens, self.get_seq_length())

    def reset(self):
        self._forget()


def one_cache(past_key_values, cache):
    """The cache, by either of the names that transformers has for it."""
    if past_key_values is not None and cache is not None and cache is not past_key_values:
        raise ValueError("past_key_values and cache are two names of one argument, and both were given")
    return cache if past_key_values is None else past_key_values


def adopt_cache(cache, layers):
    """Make every layer of a DynamicCache an SSALayer, keeping what it holds."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        raise ValueError(f"past_key_values must be a DynamicCache without offloading, got {type(cache).__name__}")
    for i in range(layers):
        held = cache.layers[i] if i < len(cache.layers) else None
        if isinstance(held, SSALayer):
            continue
        layer = SSALayer()
        if held is not None and held.get_seq_length():
            layer.update(held.keys, held.values)
        cache.layers[i : i + 1] = [layer]
    return cache


# -------------------------------------------------------------------------------------------------------------- routing
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
    if (
        config.topk == "authors"
    ):  # their kernel keeps the best 8 of the earlier chunks and the best of the current chunk of 16
        edge = own[..., None] // 16 * 16
        parts = (
            best_blocks(score.masked_fill(index >= edge, -1.0), 8),
            best_blocks(score.masked_fill(index < edge, -1.0), 7),
        )
        chosen = F.pad(chosen, (0, max(0, 15 - chosen.shape[-1])), value=-1)
        parts = F.pad(torch.cat(parts, -1), (0, chosen.shape[-1] - 15), value=-1)
        chosen = torch.where(edge > 0, parts, chosen)
    return torch.cat((own[..., None], chosen), -1)


# -------------------------------------------------------------------------------------------------------------- streams
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


@lru_cache
def bundled_kernels():
    """What triton_ssa.py beside this file holds, or None where triton is not installed; imported when it is needed first."""
    try:
        from .triton_ssa import attend, group_scores, serves
    except ImportError:
        return None
    return serves, group_scores, attend


def kernels_for(config, *tensors):
    """(group_scores, attend) of the bundled Triton kernels; None for PyTorch's: gradients, other devices, sparse_backend."""
    if config.sparse_backend == "torch" or not tensors[0].is_cuda:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    found = bundled_kernels()
    return found[1:] if found and found[0](*tensors) else None


def sparse_stream(q, k, v, pooled_k, position_bt, start_b, config, block_count):
    """Attention to the selected blocks, [B, H, T, D]; gathers S blocks a query, so only routing grows with N."""
    batch, heads, tokens, dim = q.shape
    kv_heads, total, size = k.shape[1], k.shape[2], config.block_size
    if block_count * size >= total and config.topk == "exact":
        return full_stream(q, k, v, position_bt, start_b)
    kernels = kernels_for(config, q, k, v)
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
    """nsa: attention to the pooled keys and values of the complete blocks, zero where there is none, [B, H, T, D]."""
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
    """nsa: causal attention over the last `window` tokens, own included, [B, H, T, D]."""
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


# ---------------------------------------------------------------------------------------------------------------- model
class SSARMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        normed = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + self.eps)
        return (normed * wide(self.weight)).to(x.dtype)


class SSAAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        hidden, heads, kv_heads, dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(hidden, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.g_proj = nn.Linear(hidden, heads * config.gates, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)

    def forward(self, x, position_bt, table, start_b, cache, mode, block_count, align, outside=None):
        """x [B, T, hidden] -> ([B, T, hidden], [B, T] alignment loss a token, or None unless `align`).

        outside: an attention function of transformers' interface that runs in place of the full stream.
        """
        config = self.config
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, -1, config.head_dim).transpose(1, 2) for f in self._projections())
        gate = torch.sigmoid(wide(self.g_proj(x))).view(batch, tokens, -1, config.gates).transpose(1, 2)
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        nsa = config.attention_kind == "nsa"
        pooled_k = pooled_v = None
        if nsa or align or mode == "sparse":
            if cache is not None:
                pooled_k, pooled_v = cache.layers[self.layer_idx].pool(config.block_size, start_b, nsa)
            else:
                count = k.shape[2] // config.block_size
                pooled_k = pool_blocks(k, 0, count, config.block_size, start_b)
                pooled_v = pool_blocks(v, 0, count, config.block_size, start_b) if nsa else None

        def stream(kind):
            if outside is not None:
                found, _ = outside(self, q, k, v, None, scaling=config.head_dim**-0.5)
                return found.reshape(batch, tokens, -1, config.head_dim).transpose(1, 2)
            if kind == "full":
                return full_stream(q, k, v, position_bt, start_b)
            return sparse_stream(q, k, v, pooled_k, position_bt, start_b, config, block_count)

        loss = None
        if align:
            gated = {kind: gate * stream(kind) for kind in MODES}
            full, sparse = gated["full"], gated["sparse"]
            loss = F.smooth_l1_loss(full, sparse.detach(), reduction="none")
            loss = (loss + F.smooth_l1_loss(full.detach(), sparse, reduction="none")).mean((1, 3))
            output = gated[mode]
        elif nsa:
            output = gate[..., :1] * compressed_stream(q, pooled_k, pooled_v, position_bt, config)
            output = output + gate[..., 1:2] * stream(mode)
            output = output + gate[..., 2:] * window_stream(q, k, v, position_bt, start_b, config.window)
        else:
            output = gate * stream(mode)
        return self.o_proj(output.to(x.dtype).transpose(1, 2).flatten(2)), loss

    def _projections(self):
        return self.q_proj, self.k_proj, self.v_proj


class SSAMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SSADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = SSAAttention(config, layer_idx)
        self.mlp = SSAMLP(config)
        self.input_layernorm = SSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SSARMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *attention_arguments):
        attended, loss = self.self_attn(self.input_layernorm(x), *attention_arguments)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class SSAPreTrainedModel(PreTrainedModel):
    config_class = SSAConfig
    base_model_prefix = "model"
    _no_split_modules = ["SSADecoderLayer"]  # noqa: RUF012 - transformers' form
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, SSARMSNorm):
            nn.init.ones_(module.weight)

    def set_attention(self, *, inference_mode=None, block_count=None):
        """Change what a forward runs when its own arguments do not say; kept by save_pretrained. Returns the model."""
        if inference_mode is not None:
            self.config.inference_mode = check_choice("inference_mode", inference_mode, MODES)
        if block_count is not None:
            if block_count < 1:
                raise ValueError(f"block_count={block_count} must be at least 1: the own block is always selected")
            self.config.block_count = block_count
        return self


@dataclass
class SSAModelOutput(BaseModelOutputWithPast):
    alignment_loss: torch.FloatTensor | None = None


@dataclass
class SSACausalLMOutput(CausalLMOutputWithPast):
    """`alignment_loss`: mean over layers, tokens, heads and channels, before its weight; None unless ssa trains."""

    alignment_loss: torch.FloatTensor | None = None


class SSAModel(SSAPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        config.check_attention()  # `from_pretrained(folder, block_count=...)` sets what the config's own checks never saw
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SSADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = SSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        inference_mode=None,
        block_count=None,
        with_alignment=False,
        cache=None,
        **kwargs,
    ):
        """`attention_mask` [B, past + T]; `past_key_values` may also be given as `cache`.

        `inference_mode` and `block_count` overrule the config for this call. Other arguments are handed to the attention
        function of `config._attn_implementation` where it is not SDPA.
        """
        mode = check_choice("inference_mode", inference_mode or self.config.inference_mode, MODES)
        block_count = self.config.block_count if block_count is None else block_count
        if block_count < 1:
            raise ValueError(f"block_count={block_count} must be at least 1: the own block is always selected")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = one_cache(past_key_values, cache)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not torch.is_grad_enabled():
            past_key_values = DynamicCache()
        if self.training and self.layers[0].gradient_checkpointing:
            use_cache = False  # a layer computed again in backward would append its tokens again
        cache = adopt_cache(past_key_values, len(self.layers)) if use_cache and past_key_values is not None else None
        past = 0 if cache is None else cache.get_seq_length()
        start_b = self._starts(attention_mask, cache, past + x.shape[1], past)
        position = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if start_b is not None:
            position = (position - start_b.to(x.device)[:, None]).clamp(min=0)  # padding itself counts as position 0
        table = rotary_table(position if position_ids is None else position_ids, self.config, wide(x).dtype)
        outside = self._outside(mode, cache is not None or start_b is not None or with_alignment, kwargs)
        hidden, losses = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden.append(x)
            # under device_map the layers' hooks bring these along; all but the cache, which lives where its layer does
            x, loss = layer(x, position, table, start_b, cache, mode, block_count, with_alignment, outside)
            losses.append(loss)
        x = self.norm(x)
        alignment = None
        if with_alignment:
            per_token = torch.stack([loss.to(x.device) for loss in losses]).mean(0)
            real = torch.ones_like(per_token) if attention_mask is None else attention_mask.to(per_token)
            alignment = (per_token * real).sum() / real.sum().clamp(min=1)
        output = SSAModelOutput(
            last_hidden_state=x,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            alignment_loss=alignment,
            **{CACHE: cache},
        )
        return output.to_tuple() if return_dict is False else output

    def _outside(self, mode, more, kwargs):
        """The registered attention function, or None for this file's own streams.

        One call of it is the full stream of rows that it separates itself (vLLM), and can be nothing else here.
        """
        name = self.config._attn_implementation
        if name in (None, "sdpa", "eager"):
            return None
        if mode != "full" or self.config.attention_kind == "nsa" or more:
            raise ValueError(
                f"attn_implementation={name!r} runs full mode only, not nsa, without padding, cache and alignment loss"
            )
        return partial(ALL_ATTENTION_FUNCTIONS[name], **kwargs)

    def _starts(self, attention_mask, cache, total, past):
        """[B] first real tokens or None; without a mask a continued cache keeps the padding it was filled with."""
        if attention_mask is None:
            return cache.layers[0].start_b if past else None
        if attention_mask.dim() == 2 and attention_mask.shape[1] != total:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens; cache and input hold {total}")
        start_b = row_starts(attention_mask)
        if cache is not None:
            cache.layers[0].start_b = start_b
        return start_b


class SSAForCausalLM(SSAPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - 4.57 reads the keys only

    def __init__(self, config):
        super().__init__(config)
        self.model = SSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        inference_mode=None,
        block_count=None,
        trunk=None,
        num_items_in_batch=None,
        cache=None,
        **kwargs,
    ):
        """Logits [B, T, V] and, with `labels`, the loss: cross-entropy (training ssa: + alignment_weight * alignment).

        `trunk` ("full" or "sparse") is `inference_mode` by its name in training: which stream feeds the residual. ssa in
        training with neither draws it, sparse with probability `sparse_probability`, from torch's CPU generator.
        `num_items_in_batch` is what transformers' Trainer passes when it accumulates gradients: the loss is then
        divided by it.
        """
        if trunk is not None and inference_mode not in (None, trunk):
            raise ValueError(f"trunk={trunk!r} and inference_mode={inference_mode!r} contradict each other")
        mode = trunk or inference_mode
        align = self.training and labels is not None and self.config.attention_kind == "ssa"
        if align and mode is None:
            mode = "sparse" if torch.rand(()).item() < self.config.sparse_probability else "full"
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            inference_mode=mode,
            block_count=block_count,
            with_alignment=align,
            **kwargs,
        )
        x = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device)
            scores = wide(logits[:, :-1]).flatten(0, 1)
            counted = (targets != -100).sum()
            divisor = counted if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(scores, targets.flatten(), ignore_index=-100, reduction="sum") / divisor
            if align:
                loss = loss + self.config.alignment_weight * output.alignment_loss * (counted / divisor)
        result = SSACausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            alignment_loss=output.alignment_loss,
            **{CACHE: getattr(output, CACHE)},
        )
        return result.to_tuple() if return_dict is False else result

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, cache=None, **kwargs
    ):
        """The tokens the cache has not seen. Positions come from the mask, so transformers' own are dropped."""
        past_key_values = one_cache(past_key_values, cache)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        told = kwargs.pop("next_sequence_length", None)
        for name in ("cache_position", "position_ids", "is_first_iteration"):
            kwargs.pop(name, None)
        inputs = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
        if inputs_embeds is not None and past == 0:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            if attention_mask is not None:
                new = attention_mask.shape[1] - past
            else:  # after a prompt of embeddings, input_ids hold fewer tokens than the cache; transformers 5 gives no mask then
                new = told or input_ids.shape[1] - past
            inputs["input_ids"] = input_ids[:, -new:].contiguous()
        return inputs


SSAConfig.register_for_auto_class()
SSAModel.register_for_auto_class("AutoModel")
SSAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
