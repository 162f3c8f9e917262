"""SSA attention: reference, memory-lean PyTorch backend and fused kernels behind one interface (see `ssa_kernels.api`).

Imports torch and triton and nothing else of this project.
Importing it compiles nothing and touches no device.
"""

from ssa_kernels.api import (
    attention_statistics,
    compressed_attention,
    full_attention,
    select_blocks,
    sparse_attention,
    ssa_attention,
    window_attention,
)
from ssa_kernels.inference.cached_attention import cached_attention, cached_blocks
from ssa_kernels.inference.kv_cache import KVCache, PagedKVCache
from ssa_kernels.spec import AttentionStatistics, BlockSpec, KernelArgumentError

__all__ = [
    "AttentionStatistics",
    "BlockSpec",
    "KVCache",
    "KernelArgumentError",
    "PagedKVCache",
    "attention_statistics",
    "cached_attention",
    "cached_blocks",
    "compressed_attention",
    "full_attention",
    "select_blocks",
    "sparse_attention",
    "ssa_attention",
    "window_attention",
]
