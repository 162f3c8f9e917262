"""The cache of an exported model: keys, values, and the pooled keys of the blocks completed so far.

A step pools only the blocks that its tokens complete, and gives what pooling everything at once gives; whatever transformers
does to a cache is done to all three. It refuses caches other than transformers' DynamicCache. This file is copied into
exported folders: torch and transformers only.

Shapes: B rows, T new tokens, N tokens seen so far (cache included), H query heads, K key/value heads, G = H / K, D head
dim, M blocks, S blocks selected. `start_b` is the index of each row's first real token, or None when no row is padded.
"""

from dataclasses import fields

import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .positions_ssa import wide

CACHE = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else "past_key_values"
"""What this transformers calls the cache: `cache` in 5.24, whose generate() hands it to a forward by no other name."""


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
    """One layer's cache: keys and values, and the pooled keys of the blocks completed so far.

    A compressed stream pools values too.

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
            # writing into a buffer would break autograd's saved tensors
            self.keys = torch.cat((self.keys, key_states), 2)
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
        # the sign's meaning differs between transformers 4 and 5; only the result matters here
        super().crop(*args, **kwargs)
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
