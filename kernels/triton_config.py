"""Which tile, how many warps: the checked-in choice per shape, made from benchmark runs (`python -m kernels.bench`).

No autotuning ever happens in a training run: ranks that tune differently are a silent fault.
It refuses nothing; unknown shapes get the general row.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """Tiles of every kernel for one head dimension."""

    stat_rows: int = 64
    stat_tile: int = 64
    stat_warps: int = 4
    select_rows: int = 64
    select_tile: int = 64
    select_warps: int = 4
    sparse_keys: int = 128  # keys of one step of the sparse forward and dQ kernels
    sparse_warps: int = 4
    sparse_stages: int = 2
    dq_keys: int = 128
    dq_warps: int = 4
    dq_stages: int = 2
    dkv_rows: int = 64  # query-head rows of one step of the sparse dK/dV kernel
    dkv_warps: int = 2
    dkv_stages: int = 3
    gate_rows: int = 64
    # (rows, keys, warps, stages)
    dense_forward: tuple[int, int, int, int] = (128, 64, 4, 3)
    dense_dq: tuple[int, int, int, int] = (64, 64, 4, 3)
    dense_dkv: tuple[int, int, int, int] = (64, 64, 4, 3)


TABLE = {
    64: Config(),
    128: Config(
        sparse_keys=64, dq_keys=64, dense_forward=(128, 64, 8, 3), dense_dq=(64, 64, 4, 2), dense_dkv=(64, 64, 8, 2)
    ),
}


def choose(head_dim: int) -> Config:
    small = (32, 32, 4, 2)
    general = Config(sparse_keys=32, dq_keys=32, dense_forward=small, dense_dq=small, dense_dkv=small)
    return TABLE.get(head_dim, general)
