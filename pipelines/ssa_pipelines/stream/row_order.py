"""The order of the rows of one source, epoch after epoch, as a pure function.

Position p of a source is row `order(seed, epoch = p // rows)[p % rows]`. Each epoch holds every row exactly once. The order
depends only on the seed, the epoch and the shard sizes, not on processes, nodes or restarts. It refuses a shuffle that loses
or repeats a row.
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

    The shuffle is streaming's `py1e`: it permutes the shards and the rows within each, then moves every row by up to half a
    `block` of rows (at least four times the largest shard). So reading stays within a window of shards, which matters when
    they are downloaded. Raises DatasetError if a row is lost or repeated.
    """
    rows = int(rows_per_shard.sum())
    if not shuffle:
        return np.arange(rows)
    from streaming.base.shuffle import get_shuffle

    block = window_rows(rows_per_shard, block)
    # Always one canonical node: streaming's default is the number of physical nodes, and the order would depend on it.
    order = get_shuffle("py1e", rows_per_shard, 1, seed, epoch, block)
    if not np.array_equal(np.bincount(order, minlength=rows), np.ones(rows, np.int64)):
        problem, remedy = (
            f"epoch {epoch}: the shuffle lost or repeated rows",
            "report this as a bug, with the versions used",
        )
        raise DatasetError(problem, remedy=remedy, id="shuffle-broken")
    return order


def window_rows(rows_per_shard: NDArray[np.int64], block: int) -> int:
    """Number of consecutive stored rows that the shuffle mixes with each other."""
    return max(block, 4 * int(rows_per_shard.max()))


class RunOrder:
    """The rows of one source over a whole run, by position. Holds the orders of up to three epochs, 8 bytes per row each."""

    def __init__(self, rows_per_shard: NDArray[np.int64], *, seed: int, shuffle: bool, block: int = SHUFFLE_BLOCK):
        self.rows = int(rows_per_shard.sum())
        self._rows_per_shard = rows_per_shard
        self._seed, self._shuffle, self._block = seed, shuffle, block
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._digest = (-1, "")

    def at(self, position: int) -> int:
        """The row number at a position, counted over all epochs."""
        return int(self._epoch(position // self.rows)[position % self.rows])

    def digest(self, position: int) -> str:
        """A digest of the order of the epoch that contains `position`; equal only for equal orders."""
        epoch = position // self.rows
        if self._digest[0] != epoch:
            order = np.ascontiguousarray(self._epoch(epoch), "<i8")
            self._digest = epoch, hashlib.blake2b(order.data, digest_size=16).hexdigest()
        return self._digest[1]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        # The reading thread and the thread that saves the position both call this. A new dict is safe: at worst both compute
        # the same order. Neighbouring epochs are kept, since a micro-batch may straddle two and reading runs ahead.
        order = self._orders.get(epoch)
        if order is None:
            order = epoch_order(
                self._rows_per_shard, seed=self._seed, epoch=epoch, shuffle=self._shuffle, block=self._block
            )
            self._orders = {**{e: o for e, o in self._orders.items() if abs(e - epoch) == 1}, epoch: order}
        return order
