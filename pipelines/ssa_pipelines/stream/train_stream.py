"""Micro-batches of packed rows: endless for training, the first N rows for evaluation.

Micro-batch k of the run is rows [k*M, (k+1)*M) of the run, and data-parallel rank r of D reads k = r, r + D, r + 2D, ... So
the rows of a step, and of every micro-batch in it, do not depend on D, and a position is one number. It refuses to continue
from a position saved on other data or in another order. It never ends an epoch early and never hangs.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssa_pipelines.errors import DatasetError
from ssa_pipelines.shards.packing import doc_starts
from ssa_pipelines.shards.row_reader import RowReader
from ssa_pipelines.storage.prefetch import DaemonPool
from ssa_pipelines.storage.shard_cache import Access
from ssa_pipelines.storage.stall_timer import StallTimer
from ssa_pipelines.stream.mixture import Phase
from ssa_pipelines.stream.position import restore, save
from ssa_pipelines.stream.row_order import SHUFFLE_BLOCK
from ssa_pipelines.stream.run_rows import Location, RowOrigin, RunRows, open_sources

_FETCHERS = 4  # threads that fetch shards ahead
_FETCH_AHEAD_ROWS = 4096  # of all ranks
_GRACE = 5.0  # seconds beyond the stall timeout, in which a failing fetch raises its own, more precise error


class Rows(NamedTuple):
    """One micro-batch.

    tokens: int64 [micro_batch_rows, row_length].
    doc_starts: int32, same shape: per token the index in its row at which its document begins.
    """

    tokens: Tensor
    doc_starts: Tensor


class TrainStream:
    """An endless iterator over the micro-batches of one data-parallel rank, epoch after epoch.

    Every process constructs its own with its data-parallel rank. Processes that share that rank (tensor, pipeline and context
    parallel) get the same rows. This needs no communication, no torch.distributed and no shared memory.

    sources, split: a prepared dataset (a folder or a URL), or several by name, and the split to read.
    phases: weights of several sources, and the token counts at which they change; by default in proportion to their rows.
    micro_batch_rows (M), global_batch_rows (G): rows per micro-batch of one rank, and per step of all ranks; G is a multiple
        of M * data_parallel_size.
    seed, shuffle, shuffle_block: the order of the rows; without shuffle they come as they were packed.
    read_ahead: micro-batches read in advance by one thread; 0 reads when asked. The rows are the same.
    access: cache of remote datasets, and the stall timeout after which a row that does not arrive is an error.
    Raises DatasetError, ShardError (naming the shard) on opening and on reading.
    """

    def __init__(
        self,
        sources: Location | Mapping[str, Location],
        split: str = "train",
        *,
        phases: Sequence[Phase] = (),
        micro_batch_rows: int,
        global_batch_rows: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        shuffle: bool = True,
        shuffle_block: int = SHUFFLE_BLOCK,
        read_ahead: int = 2,
        access: Access | None = None,
    ):
        _check_layout(micro_batch_rows, global_batch_rows, data_parallel_rank, data_parallel_size, "global_batch_rows")
        if seed < 0 or read_ahead < 0:
            problem = f"seed {seed}, read_ahead {read_ahead}: both must be 0 or more"
            raise DatasetError(problem, remedy="use 0 or more", id="negative-setting")
        self.infos = open_sources(sources, access)
        self.split, self.samples_seen = split, 0
        order: dict[str, Any] = {"seed": seed, "shuffle": shuffle, "shuffle_block": shuffle_block}
        self._stall_timer = StallTimer((access or Access()).stall_timeout)
        self.rows = RunRows(self.infos, split, phases=phases, **order, access=access, stall_timer=self._stall_timer)
        self.order = order
        self.changes: list[dict] = []  # accepted so far; see load_state_dict
        self._rows_per_epoch = sum(reader.rows for reader in self.rows.readers)
        self._micro_batch_rows = micro_batch_rows
        self._offset = data_parallel_rank * micro_batch_rows
        self._stride = data_parallel_size * micro_batch_rows
        self._read_ahead = read_ahead
        self._thread = DaemonPool(1, "row-reader")
        self._pending: deque[Future[Rows]] = deque()
        slow = any(not reader.is_direct for reader in self.rows.readers)
        self._fetchers = DaemonPool(_FETCHERS, "shard-fetcher") if slow else None
        limit = access.cache_limit if access else None
        fit = _FETCH_AHEAD_ROWS if limit is None else limit // (16 * self.rows.row_length)  # a quarter of the cache
        self._fetch_ahead_rows = min(fit, _FETCH_AHEAD_ROWS)
        self._fetched_to = 0
        self._asked: deque[tuple[int, int]] = deque(maxlen=256)  # shards requested lately

    @property
    def rows_per_epoch(self) -> int:
        """Rows in the split, over all sources."""
        return self._rows_per_epoch

    @property
    def epochs(self) -> dict[str, float]:
        """Epochs of each source so far."""
        return self.rows.epochs(self.samples_seen)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        self._fetch_ahead()
        while len(self._pending) <= self._read_ahead:
            ahead = self.samples_seen + len(self._pending) * self._stride
            self._pending.append(self._thread.submit(self._read, ahead))
        future = self._pending.popleft()
        try:
            rows = _waited_for(future, self._stall_timer, self.rows.readers)
        except BaseException:
            self._drop_pending()  # the next call must read the same position again
            raise
        self.samples_seen += self._stride
        return rows

    def row_origins(self, begin: int, count: int) -> list[RowOrigin]:
        """Source, epoch and row number of rows begin .. begin + count - 1 of the run, over all ranks."""
        return self.rows.origins(begin, count)

    def state_dict(self) -> dict:
        """The position as JSON values. It does not depend on the topology: any rank of any layout can load it."""
        return save(self)

    def load_state_dict(self, state: dict, *, accept_changes: str | None = None) -> None:
        """Continues where `state` was taken: the next rows are those of an uninterrupted run.

        accept_changes: the reason why data, weights, seed or shuffle may differ from the state's. Sources with the same
            dataset continue, others begin at their first row. The change and its reason stay in the state.
        Raises DatasetMismatch, with every difference, if there is one and no reason.
        """
        restore(self, state, accept_changes)
        self._drop_pending()
        self._fetched_to = 0

    def close(self) -> None:
        """Ends the threads. The stream cannot be read afterwards. A process may also exit without this."""
        self._drop_pending()
        self._stall_timer.end()
        self._thread.close(5)
        if self._fetchers is not None:
            self._fetchers.close(0)

    def _read(self, samples_seen: int) -> Rows:
        return _collate(self.rows.read(samples_seen + self._offset, self._micro_batch_rows), self.rows.row_length)

    def _fetch_ahead(self) -> None:
        """Submits fetches for the shards of this rank's next rows, a few rows further with each call."""
        if self._fetchers is None:
            return
        begin = max(self.samples_seen, self._fetched_to)
        last = self.samples_seen + max(self._fetch_ahead_rows, self._stride)
        for position in range(begin, min(last, begin + 16 * self._stride), self._stride):
            for source, shard in self.rows.shards(position + self._offset, self._micro_batch_rows):
                if (source, shard) not in self._asked:
                    self._asked.append((source, shard))
                    self._fetchers.submit(self.rows.readers[source].prefetch, shard)
            self._fetched_to = position + self._stride

    def _drop_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        with contextlib.suppress(Exception):
            if self._pending:  # a read in progress must not run next to a later one
                self._pending[0].result(0)
        self._pending.clear()


def evaluation_rows(
    sources: Location | Mapping[str, Location],
    split: str = "validation",
    *,
    rows: int,
    micro_batch_rows: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    access: Access | None = None,
) -> Iterator[Rows]:
    """Yields this rank's micro-batches of the first `rows` rows of a split, as they were packed; the same every time.

    Several sources contribute in proportion to their splits. All ranks together see each row once. Raises DatasetError at
    once if there are fewer rows, or `rows` is not a multiple of micro_batch_rows * data_parallel_size; ShardError as
    TrainStream does.
    """
    _check_layout(micro_batch_rows, rows, data_parallel_rank, data_parallel_size, "rows")
    infos = open_sources(sources, access)
    have = [info.split(split).rows for info in infos.values()]
    if rows > sum(have):
        where = ", ".join(info.location for info in infos.values())
        raise DatasetError(
            f"rows {rows}: the split {split!r} of {where} holds {sum(have)}",
            remedy="evaluate on fewer rows, or prepare with a larger validation_fraction",
            id="too-few-rows",
        )
    ends = [rows * sum(have[: i + 1]) // sum(have) for i in range(len(have))]
    stall_timer = StallTimer((access or Access()).stall_timeout)
    readers = [RowReader(info, split, access, stall_timer=stall_timer) for info in infos.values()]
    chosen = [
        (reader, row)
        for reader, begin, end in zip(readers, [0, *ends[:-1]], ends, strict=True)
        for row in range(end - begin)
    ]
    begins = range(data_parallel_rank * micro_batch_rows, rows, micro_batch_rows * data_parallel_size)
    length = next(iter(infos.values())).row_length

    def read(begin: int) -> Rows:
        return _collate([reader.read(row) for reader, row in chosen[begin : begin + micro_batch_rows]], length)

    def batches() -> Iterator[Rows]:
        thread = DaemonPool(1, "row-reader")
        try:
            for begin in begins:
                yield _waited_for(thread.submit(read, begin), stall_timer, readers)
        finally:
            stall_timer.end()
            thread.close(0)

    return batches()


def _waited_for(future: Future[Rows], stall_timer: StallTimer, readers: list[RowReader]) -> Rows:
    """The rows, or a DatasetError that names what the thread is still reading when the stall timeout ends.

    A failing fetch ends by itself, a little sooner. Work other than reading (the order of a large epoch) is not limited.
    """
    with stall_timer.waiting():
        while (left := stall_timer.left(stall_timer.moved) + _GRACE) > 0:
            try:
                return future.result(min(left, 1.0))
            except TimeoutError:
                if future.done():  # raised by the read itself
                    raise
            if not any(reader.doing for reader in readers):
                stall_timer.progressed()
    doing = ", ".join(sorted({reader.doing for reader in readers} - {""}))
    raise DatasetError(
        f"no row arrived for {stall_timer.seconds + _GRACE:g} s while reading {doing}",
        remedy="check its file system or store; the same command continues",
        id="read-stalled",
    )


def _collate(found: list[tuple[np.ndarray, np.ndarray, np.ndarray]], row_length: int) -> Rows:
    tokens = np.empty((len(found), row_length), np.int64)
    starts = np.empty((len(found), row_length), np.int32)
    for i, (row, row_starts, _) in enumerate(found):
        tokens[i], starts[i] = row, doc_starts(row_starts, row_length)
    return Rows(torch.from_numpy(tokens), torch.from_numpy(starts))


def _check_layout(micro: int, total: int, rank: int, size: int, name: str) -> None:
    if micro < 1 or size < 1 or not 0 <= rank < size:
        raise DatasetError(
            f"micro_batch_rows {micro}, data_parallel_rank {rank}, data_parallel_size {size}: impossible",
            remedy="use micro_batch_rows >= 1 and 0 <= data_parallel_rank < data_parallel_size",
            id="data-parallel-layout",
        )
    if total < 1 or total % (micro * size):
        raise DatasetError(
            f"{name} {total} is not a multiple of micro_batch_rows {micro} x data_parallel_size {size}",
            remedy=f"use a multiple of {micro * size}",
            id="batch-not-a-multiple",
        )
