"""Which tile, how many warps: the checked-in choice per shape, made from benchmark runs (`python -m benchmarks.attention`).

No autotuning ever happens in a training run: ranks that tune differently are a silent fault.
It refuses nothing; unknown shapes get the general row.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    """Tiles of every kernel for one head dimension."""

    stat_rows: int = 128  # (token, head) rows
    stat_tile: int = 64
    stat_warps: int = 4
    stat_stages: int = 2
    stat_registers: int | None = None  # at most, of a thread
    select_rows: int = 64  # tokens
    select_tile: int = 64
    select_warps: int = 4
    select_stages: int = 3
    select_registers: int | None = None
    insert_tile: int = 128  # pooled keys of a tile whose best are inserted into short lists of group scores
    select_sorted: int = 129  # budgets up to this keep their lists in registers, larger ones in memory
    select_few: int = 6  # keys of a tile that are put into a list one by one
    select_programs: int = 4  # on each multiprocessor; each has its own lists of candidates
    sparse_keys: int = 64  # keys of one step of the sparse forward and dQ kernels
    sparse_warps: int = 1
    sparse_stages: int = 2
    dq_keys: int = 64
    dq_warps: int = 1
    dq_stages: int = 2
    dkv_rows: int = 128  # query-head rows of one step of the sparse dK/dV kernel
    dkv_warps: int = 2
    dkv_stages: int = 3
    gate_rows: int = 64
    # (rows, keys, warps, stages)
    dense_forward: tuple[int, int, int, int] = (64, 128, 4, 2)
    dense_dq: tuple[int, int, int, int] = (64, 64, 4, 3)
    dense_dkv: tuple[int, int, int, int] = (64, 64, 4, 3)
    dual_forward: tuple[int, int, int, int] = (64, 64, 4, 3)
    dual_dq: tuple[int, int, int, int] = (64, 64, 4, 2)
    dual_dkv: tuple[int, int, int, int] = (64, 64, 4, 2)


# Measured on one H100 80GB (bf16, shapes A and B of docs/performance.md). Spills decide at 128: one warp cannot hold the tiles.
TABLE = {
    64: Config(),
    128: Config(
        stat_warps=8,
        sparse_keys=64, sparse_warps=2, dq_keys=32, dq_warps=2, dkv_rows=64, dkv_warps=4, dkv_stages=2,
        dense_forward=(64, 64, 4, 3), dense_dq=(128, 64, 8, 3), dense_dkv=(64, 64, 4, 2),
    ),
}  # fmt: skip
# Tokens of a batch from which on cuDNN beats our dense kernel without documents, by head size.
VENDOR_TOKENS = {64: 16384, 128: 0}
SMALL = (32, 32, 4, 2)
GENERAL = Config(
    stat_rows=32, stat_tile=32, select_rows=32, select_tile=32, insert_tile=32, select_stages=2,
    sparse_keys=32, sparse_warps=2, dq_keys=32, dq_warps=2,
    dkv_rows=32, dkv_stages=2, dense_forward=SMALL, dense_dq=SMALL, dense_dkv=SMALL,
    dual_forward=SMALL, dual_dq=SMALL, dual_dkv=SMALL,
)  # fmt: skip


def choose(q: Tensor) -> Config:
    """By head dimension; fp32 (three tensor-core products each) and other sizes take small tiles that fit anything."""
    return TABLE.get(q.shape[3], GENERAL) if q.dtype != torch.float32 else GENERAL


DUAL_ALONE, DUAL_DOCUMENTS = 128, 256


def dual(q: Tensor, k: Tensor, size: int, count: int, doc_starts: Tensor | None, query_index: Tensor | None) -> bool:
    """Whether SSA's two streams share one pass over key tiles (triton_dual.py).

    In that pass a second stream costs products with every earlier key; gathered, it costs `size * count` keys a token,
    once for the whole query group. So the pass wins while tokens * group stay below a multiple of the budget. Measured
    at head dimension 128 and a budget of 256 (docs/performance.md): 128 is 8k tokens of groups of 4 (10 % faster) and 32k of
    groups of 1 (8 %), 256 is 8k of groups of 8 (6 % slower). Documents, which are shorter than their row, shorten the pass alone.
    """
    group = q.shape[2] // k.shape[2]
    fits = query_index is None and size in (16, 32, 64, 128) and q.shape[3] <= 128 and group <= 8
    return fits and q.shape[1] * group <= (DUAL_ALONE if doc_starts is None else DUAL_DOCUMENTS) * size * count
