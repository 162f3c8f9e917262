"""Attention over a KV cache: decode, chunked prefill, sparse or full, by one function (arXiv 2511.20102, section 3).

`cached_attention(q, cache, spec)` gives each of q's T tokens, which are the last T of its sequence, exactly what
`sparse_attention` (or `full_attention`) over the whole sequence gives it. Up to STEP tokens it decodes: kernels that
read the cached pooled keys, launch by capacity and may be held by a CUDA graph. More tokens are a prefill, which runs
the training kernels a sequence at a time. A wrong argument is refused with a `KernelArgumentError`, without waiting for
the GPU.
"""

import torch
from torch import Tensor

from ssa_kernels import api, checks
from ssa_kernels.autograd import plain
from ssa_kernels.inference import torch_decode
from ssa_kernels.inference.kv_cache import STEP, KVCache, PagedKVCache
from ssa_kernels.spec import BlockSpec


def _check(q: Tensor, cache, spec: BlockSpec | None, mode: str, scale, backend: str) -> tuple[float, str]:
    need = checks.need
    need(isinstance(cache, KVCache | PagedKVCache), "cache", type(cache).__name__, "a KVCache or a PagedKVCache")
    need(isinstance(q, Tensor), "q", type(q).__name__, "a tensor [B, T, Hq, D]")
    need(q.dim() == 4 and min(q.shape) >= 1, "q.shape", tuple(q.shape), "[B, T, Hq, D], no size 0")
    need(q.dtype == cache.dtype, "q.dtype", q.dtype, f"the cache's {cache.dtype}")
    need(q.device == cache.device, "q.device", q.device, f"the cache's {cache.device}")
    need(q.shape[0] == cache.batch, "q.shape[0]", q.shape[0], f"the cache's {cache.batch} sequences")
    need(q.shape[3] == cache.head_dim, "q.shape[3]", q.shape[3], f"the cache's head dimension {cache.head_dim}")
    heads = cache.kv_heads
    need(q.shape[2] % heads == 0, "q.shape[2] (Hq)", q.shape[2], f"a multiple of the cache's {heads} heads (Hkv)")
    need(mode in ("full", "sparse"), "mode", repr(mode), "'full' or 'sparse'")
    if mode == "sparse":
        checks.check_spec(spec)
        size = cache.block_size
        need(spec.block_size == size, "spec.block_size", spec.block_size, f"{size}, by which the cache pools its keys")
    return checks.check_scale(scale, q), api.choose_backend(backend, q)


def cached_attention(
    q: Tensor,
    cache: KVCache | PagedKVCache,
    spec: BlockSpec | None = None,
    *,
    mode: str = "sparse",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of the T newest tokens of every sequence over the cache, which already holds them. No gradient.

    q: [B, T, Hq, D] in the cache's dtype; row i of sequence b sits at place `lengths[b] - T + i`. Rows whose place is
        negative (left padding, idle sequences) give zeros.
    spec: which blocks, in sparse mode; block_size must be the cache's, block_count may change from call to call.
    mode: "sparse" or "full".
    scale, backend: as in `ssa_kernels.api`.
    Returns: [B, T, Hq, D] in q's dtype.
    Raises: KernelArgumentError.
    """
    scale, backend = _check(q, cache, spec, mode, scale, backend)
    if mode == "full" or (spec.topk == "exact" and spec.block_count >= cache.slots):
        spec = None  # a budget that covers the cache selects every block
    with torch.no_grad(), plain(q):
        if q.shape[1] > STEP:
            return _prefill(q, cache, spec, scale, backend)
        if backend == "torch":
            blocks = None if spec is None else torch_decode.select(q, cache, spec, scale)
            return torch_decode.attend(q, cache, scale, blocks)
        return _decode(q.contiguous(), cache, spec, scale)[0]


def cached_blocks(
    q: Tensor,
    cache: KVCache | PagedKVCache,
    spec: BlockSpec,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The blocks that `cached_attention` selects for at most STEP tokens: int32 [B, T, Hkv, block_count] as
    `select_blocks` returns them; rows whose place is negative are -1. Raises KernelArgumentError."""
    scale, backend = _check(q, cache, spec, "sparse", scale, backend)
    checks.need(q.shape[1] <= STEP, "q.shape[1]", q.shape[1], f"at most {STEP}; select_blocks routes a prefill")
    with torch.no_grad(), plain(q):
        if backend == "torch":
            return torch_decode.select(q, cache, spec, scale)
        return _decode(q.contiguous(), cache, spec, scale)[1]


def _decode(q, cache, spec: BlockSpec | None, scale: float) -> tuple[Tensor, Tensor | None]:
    from ssa_kernels.triton import backend as triton_backend
    from ssa_kernels.triton import decode as triton_decode
    from ssa_kernels.triton import decode_split as triton_split

    triton_backend.refuse(q)
    rows = q.shape[0] * q.shape[1]
    checks.need(rows < 65536, "q.shape", f"{rows} tokens (B * T)", "at most 65535 in one step")
    if spec is None:
        return triton_split.attend_by_splits(q, cache, scale), None
    if spec.topk == "exact" and spec.block_count <= triton_decode.MOST_BLOCKS:
        return triton_decode.decode(q, cache, spec, scale)
    blocks = torch_decode.select(q, cache, spec, scale)
    return triton_split.attend_by_splits(q, cache, scale, blocks), blocks


def _prefill(q, cache, spec: BlockSpec | None, scale: float, backend: str) -> Tensor:
    """A sequence at a time through the training kernels: views of a contiguous cache, one sequence's pages copied."""
    tokens = q.shape[1]
    capturing = q.is_cuda and torch.cuda.is_current_stream_capturing()
    checks.need(not capturing, "q.shape[1]", f"{tokens} while a CUDA graph is captured", f"at most {STEP}")
    results = []
    for b, length in enumerate(cache.host_lengths):
        new = min(tokens, max(0, length))
        rows = q[b : b + 1, tokens - new :]
        if new:
            k, v = cache.sequence(b)
            index = None
            if new < length:
                index = torch.arange(length - new, length, dtype=torch.int32, device=q.device)
            options = {"scale": scale, "query_index": index, "backend": backend}
            if spec is None:
                rows = api.full_attention(rows, k, v, **options)
            else:
                rows = api.sparse_attention(rows, k, v, spec, **options)
        if new < tokens:  # padding
            rows = torch.cat((q.new_zeros(1, tokens - new, *q.shape[2:]), rows), 1)
        results.append(rows)
    return results[0] if len(results) == 1 else torch.cat(results)
