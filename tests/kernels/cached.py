"""Caches for the inference tests: filled as a server would, from sequences whose whole attention is the truth.

Storage starts as NaN, so that reading beyond a sequence's length shows. It refuses nothing.
"""

import torch

import ssa_kernels
from ssa_kernels import KVCache, PagedKVCache

from .support import generator


def sequences(lengths, h_q, h_kv, dim, *, dtype=torch.float64, device="cpu", seed=0):
    """One (q, k, v) of [1, length, heads, D] for each length."""
    gen = generator(seed)

    def normal(n, heads):
        return torch.randn(1, n, heads, dim, generator=gen, dtype=torch.float64).to(device, dtype)

    return [(normal(n, h_q), normal(n, h_kv), normal(n, h_kv)) for n in lengths]


def make_cache(paged: bool, batch, capacity, h_kv, dim, *, block_size=16, dtype=torch.float64, device="cpu", page=32):
    """An empty, poisoned cache; pages are handed out in a shuffled order."""
    page = max(page, block_size)
    kind = {"block_size": block_size, "dtype": dtype, "device": device}
    if not paged:
        cache = KVCache(batch, capacity, h_kv, dim, **kind)
    else:
        each = -(-capacity // page)
        cache = PagedKVCache(batch, batch * each + 3, page, each, h_kv, dim, **kind)
        order = torch.randperm(batch * each + 3, generator=generator(1)).tolist()
        for b in range(batch):
            cache.assign(b, order[b * each : (b + 1) * each])
    for x in (cache.keys, cache.values, cache.pooled):
        x.fill_(float("nan"))
    return cache


def last(x, tokens):
    """The last T tokens of [1, n, ...], zeros before the first."""
    pad = max(0, tokens - x.shape[1])
    return torch.cat([x.new_zeros(1, pad, *x.shape[2:]), x[:, x.shape[1] - tokens + pad :]], 1)


def fill(cache, data, upto, backend="auto"):
    """Append to every sequence its tokens up to `upto[b]` in one left-padded piece."""
    counts = [n - max(0, held) for n, held in zip(upto, cache.host_lengths, strict=True)]
    tokens = max(counts)
    if tokens:
        k, v = (torch.cat([last(x[i][:, :n], tokens) for x, n in zip(data, upto, strict=True)]) for i in (1, 2))
        cache.append(k, v, counts, backend=backend)


def step(cache, data, tokens, backend="auto"):
    """Append the next T tokens of every sequence; returns their queries [B, T, Hq, D]."""
    at = cache.host_lengths
    q, k, v = (torch.cat([x[i][:, n : n + tokens] for x, n in zip(data, at, strict=True)]) for i in range(3))
    cache.append(k, v, backend=backend)
    return q


def whole(data, spec, mode, backend="torch"):
    """Attention over each whole sequence, [1, length, Hq, D] each."""
    if mode == "full":
        return [ssa_kernels.full_attention(*x, backend=backend) for x in data]
    return [ssa_kernels.sparse_attention(*x, spec, backend=backend) for x in data]
