"""Which row comes at which position: the order of the rows, epoch after epoch, as a pure function.

Position p of a source is row `order(seed, epoch = p // rows)[p % rows]`; each epoch holds every row exactly once and
nothing but the seed, the epoch and the shard sizes enters, so no number of processes, nodes or restarts can change it.
It refuses a shuffle that loses or repeats a row.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import DatasetError

SHUFFLE_BLOCK = 1 << 18


def epoch_order(
    rows_per_shard: NDArray[np.int64], *, seed: int, epoch: int, shuffle: bool, block: int = SHUFFLE_BLOCK
) -> NDArray[np.int64]:
    """Row numbers in the order of one epoch: int64 [rows].

    The shuffle is streaming's `py1e`: the shards are permuted, the rows within each too, and every row then moves by up
    to half a `block` of rows (four of the largest shard at least), so reading stays within a window of shards, which
    matters when they are fetched from afar.
    """
    rows = int(rows_per_shard.sum())
    if not shuffle:
        return np.arange(rows)
    from streaming.base.shuffle import get_shuffle

    block = window_rows(rows_per_shard, block)
    # One canonical node, always: by default streaming takes the physical nodes, and the order would hang on them.
    order = get_shuffle("py1e", rows_per_shard, 1, seed, epoch, block)
    if not np.array_equal(np.bincount(order, minlength=rows), np.ones(rows, np.int64)):
        raise DatasetError(
            f"epoch {epoch}: the shuffle lost or repeated rows", remedy="report this: it is a fault of ours"
        )
    return order


def window_rows(rows_per_shard: NDArray[np.int64], block: int) -> int:
    """How many rows, in their stored order, the shuffle mixes with each other."""
    return max(block, 4 * int(rows_per_shard.max()))


class RunOrder:
    """The rows of one source over a whole run, by position. Holds up to three epochs' orders, 8 bytes a row each."""

    def __init__(self, rows_per_shard: NDArray[np.int64], *, seed: int, shuffle: bool, block: int = SHUFFLE_BLOCK):
        self.rows = int(rows_per_shard.sum())
        self._rows_per_shard = rows_per_shard
        self._options = {"seed": seed, "shuffle": shuffle, "block": block}
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._digest = (-1, "")

    def at(self, position: int) -> int:
        """The row number at a position, counted over all epochs."""
        return int(self._epoch(position // self.rows)[position % self.rows])

    def digest(self, position: int) -> str:
        """A short digest of the order of the epoch that `position` lies in; equal only if every row's place is."""
        epoch = position // self.rows
        if self._digest[0] != epoch:
            order = np.ascontiguousarray(self._epoch(epoch), "<i8")
            self._digest = epoch, hashlib.blake2b(order, digest_size=16).hexdigest()
        return self._digest[1]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        # Called by the reading thread and by whoever saves the position, hence no half-updated dict: at worst both
        # compute the same order. A micro-batch may straddle two epochs and reading runs ahead: neighbours are kept.
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(self._rows_per_shard, epoch=epoch, **self._options)
            self._orders = {**{e: o for e, o in self._orders.items() if abs(e - epoch) == 1}, epoch: order}
        return order
