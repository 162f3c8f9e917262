"""Micro-batches of packed rows: endless for training, the first N rows for evaluation.

The k-th micro-batch of the whole run is rows [k*M, (k+1)*M) of the run's order, and data-parallel rank r of D takes
numbers r, r + D, r + 2D, ...: the rows of a step, and of every micro-batch in it, do not depend on D, and a position is
one number. It refuses to continue from a position saved on other data or another order, and never ends an epoch short.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipelines.dataset import load_dataset_info
from pipelines.errors import DatasetError, DatasetMismatch
from pipelines.order import RunOrder
from pipelines.packing import doc_starts
from pipelines.shards import RowReader

STATE_FORMAT = 1


class Rows(NamedTuple):
    """One micro-batch.

    tokens: int64 [micro_batch_rows, row_length].
    doc_starts: int32, same shape: for each token the index in its row at which its own document begins.
    """

    tokens: Tensor
    doc_starts: Tensor


class TrainStream:
    """An endless iterator over the micro-batches of one data-parallel rank, epoch after epoch.

    Every process constructs its own, with its data-parallel rank; processes that share that rank (tensor and pipeline
    parallel) get the same rows. They need no communication, no torch.distributed and no shared memory.

    path, split: a prepared dataset and the split to read.
    micro_batch_rows (M), global_batch_rows (G): rows in a micro-batch of one rank, and in a step of all ranks; G is a
        multiple of M * data_parallel_size.
    seed, shuffle: the order of the rows; without shuffle they come as they were packed.
    read_ahead: micro-batches read in advance by one thread; 0 reads when asked. The rows are the same.
    Raises DatasetError, ShardError (naming the shard) on opening and on reading.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        *,
        micro_batch_rows: int,
        global_batch_rows: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        shuffle: bool = True,
        read_ahead: int = 2,
    ):
        _check_layout(micro_batch_rows, global_batch_rows, data_parallel_rank, data_parallel_size, "global_batch_rows")
        if seed < 0 or read_ahead < 0:
            raise DatasetError(f"seed {seed}, read_ahead {read_ahead}: both must be 0 or more", remedy="use 0 or more")
        self.info = load_dataset_info(path)
        self.split, self.seed, self.shuffle = split, seed, shuffle
        self.samples_seen = 0
        self._reader = RowReader(self.info, split)
        self._order = RunOrder(self._reader.rows_per_shard, seed=seed, shuffle=shuffle)
        self._micro_batch_rows = micro_batch_rows
        self._offset = data_parallel_rank * micro_batch_rows
        self._stride = data_parallel_size * micro_batch_rows
        self._read_ahead = read_ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="row-reader") if read_ahead else None
        self._pending: deque[Future[Rows]] = deque()

    @property
    def rows_per_epoch(self) -> int:
        """Rows in the split."""
        return self._reader.rows

    @property
    def epoch(self) -> int:
        """The epoch, from 0, that the next global row belongs to."""
        return self.samples_seen // self._reader.rows

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        rows = self._read(self.samples_seen) if self._thread is None else self._read_in_advance()
        self.samples_seen += self._stride
        return rows

    def state_dict(self) -> dict:
        """The position, for JSON. It holds nothing of the topology: any rank of any layout may load it."""
        return {
            "format": STATE_FORMAT,
            "dataset": self.info.fingerprint,
            "split": self.split,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "order": self._order.digest(self.samples_seen),
            "samples_seen": self.samples_seen,
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state` was taken: the next rows are those an uninterrupted run would have had.

        Raises DatasetMismatch, with both values, if the state is of other data, another seed or another order.
        """
        position = state.get("samples_seen")
        if state.get("format") != STATE_FORMAT or not isinstance(position, int) or position < 0:
            raise DatasetMismatch(
                f"saved position: format {state.get('format')}, samples_seen {position}, not format {STATE_FORMAT}",
                remedy="resume from a checkpoint written by this version",
            )
        own = {"dataset": self.info.fingerprint, "split": self.split, "seed": self.seed, "shuffle": self.shuffle}
        self._compare(state, own, "resume with the data, seed and shuffle of the checkpoint, or start a new run")
        own = {"order": self._order.digest(position)}
        self._compare(state, own, "resume with the version of mosaicml-streaming and numpy that began the run")
        self._drop_pending()
        self.samples_seen = position

    def close(self) -> None:
        """Ends the reading thread; the stream cannot be read afterwards. A process may also simply exit."""
        self._drop_pending()
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)

    def _compare(self, state: dict, own: dict, remedy: str) -> None:
        for field, value in own.items():
            if state.get(field) != value:
                raise DatasetMismatch(
                    f"saved position: {field} is {state.get(field)} in the checkpoint, {value} here", remedy=remedy
                )

    def _read(self, samples_seen: int) -> Rows:
        return _collate(self._reader, self._order.at(samples_seen + self._offset, self._micro_batch_rows))

    def _read_in_advance(self) -> Rows:
        while len(self._pending) <= self._read_ahead:
            self._pending.append(self._thread.submit(self._read, self.samples_seen + len(self._pending) * self._stride))
        try:
            return self._pending.popleft().result()
        except BaseException:
            self._drop_pending()  # asked again, it must read this very position again
            raise

    def _drop_pending(self) -> None:
        for future in self._pending:
            future.cancel()
        self._pending.clear()


def evaluation_rows(
    path: str | Path,
    split: str = "validation",
    *,
    rows: int,
    micro_batch_rows: int,
    data_parallel_rank: int,
    data_parallel_size: int,
) -> Iterator[Rows]:
    """Yields this rank's micro-batches of the first `rows` rows of a split, as they were packed; the same every time.

    All ranks together see each of these rows once. Raises DatasetError at once if the split holds fewer, or `rows` is
    no multiple of micro_batch_rows * data_parallel_size; ShardError as TrainStream does.
    """
    _check_layout(micro_batch_rows, rows, data_parallel_rank, data_parallel_size, "rows")
    info = load_dataset_info(path)
    if rows > info.split(split).rows:
        raise DatasetError(
            f"rows {rows}: the split {split!r} of {path} holds {info.split(split).rows}",
            remedy="evaluate on fewer rows, or prepare with a larger validation_fraction",
        )
    reader, stride = RowReader(info, split), micro_batch_rows * data_parallel_size
    begins = range(data_parallel_rank * micro_batch_rows, rows, stride)
    return (_collate(reader, list(range(begin, begin + micro_batch_rows))) for begin in begins)


def _collate(reader: RowReader, numbers: list[int]) -> Rows:
    length = reader.info.row_length
    tokens = np.empty((len(numbers), length), np.int64)
    starts = np.empty((len(numbers), length), np.int32)
    for i, number in enumerate(numbers):
        row, row_starts, _ = reader.read(number)
        tokens[i], starts[i] = row, doc_starts(row_starts, length)
    return Rows(torch.from_numpy(tokens), torch.from_numpy(starts))


def _check_layout(micro: int, total: int, rank: int, size: int, name: str) -> None:
    if micro < 1 or size < 1 or not 0 <= rank < size:
        raise DatasetError(
            f"micro_batch_rows {micro}, data_parallel_rank {rank}, data_parallel_size {size}: not a layout",
            remedy="use micro_batch_rows >= 1 and 0 <= data_parallel_rank < data_parallel_size",
        )
    if total < 1 or total % (micro * size):
        raise DatasetError(
            f"{name} {total} is not a multiple of micro_batch_rows {micro} x data_parallel_size {size}",
            remedy=f"use a multiple of {micro * size}",
        )
