"""Random access to the rows of a prepared split, through the MDS reader of mosaicml-streaming.

A row is read exactly as it was written, or a ShardError names the shard. Sizes are checked on opening, the sha256 of remote
shards on arrival, and a checksum per row on reading. It uses no shared memory and no processes, so a killed job leaves
nothing behind.
"""

import contextlib
import fcntl
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import DatasetError, ShardError
from ssa_pipelines.shards.dataset import DatasetInfo
from ssa_pipelines.shards.packing import from_sample
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.storage.integrity import check_bytes, check_sha256, check_size, decompressed
from ssa_pipelines.storage.shard_cache import Access, Cache, Wanted
from ssa_pipelines.storage.stall_timer import StallTimer

# streaming.StreamingDataset silently ends an epoch early when a shard is missing or damaged (0.13.0), and keeps its epoch in
# /dev/shm objects that survive SIGKILL. Its readers, one layer below, raise and have no such state.
_READ_FAULTS = (OSError, ValueError, IndexError, KeyError, TypeError, EOFError)
_STILL_THERE_SECONDS = 5.0  # between two checks that a cached shard exists, each of which marks it as used


class RowReader:
    """The rows of one split, by number.

    Raises ShardError: on opening, if the index or a local shard is missing or of the wrong size; on reading a damaged row
    or a remote shard that cannot be fetched. `doing` names what a read in progress waits for, "" while there is none.
    stall_timer: of the consumer of the rows; by default the caller of `read` counts as blocked.
    """

    def __init__(
        self, info: DatasetInfo, split: str, access: Access | None = None, *, stall_timer: StallTimer | None = None
    ):
        from streaming.base.format import reader_from_json  # imports torchvision and more: seconds
        from streaming.base.spanner import Spanner

        self.info, self.split, self._name = info, info.split(split), split
        self.folder = info.path / split
        access = access or Access()
        self._stall_timer = stall_timer or StallTimer(access.stall_timeout)
        self._cache = Cache(info.remote, info.path, access, self._stall_timer) if info.remote else None
        stored = self.split.files
        if self._cache:
            index = stored["index.json"]
            self._cache.fetch(Wanted(f"{split}/index.json", index.bytes, index.sha256))
        check_index(info, split)
        entries = json.loads((self.folder / "index.json").read_bytes())["shards"]
        self._shards: list[Any] = [reader_from_json(str(info.path), split, entry) for entry in entries]
        for shard in self._shards:
            shard.validate(False)  # no column may hold a pickle
        self.rows_per_shard = np.array([shard.samples for shard in self._shards], np.int64)
        self.rows = int(self.rows_per_shard.sum())
        if self.rows != self.split.rows:
            problem = f"{self.rows} rows in the index, {self.split.rows} in dataset.json"
            raise ShardError(self.folder / "index.json", problem, id="index-miscounted")
        if not self._cache:
            for name, file in stored.items():
                check_size(self.folder / name, file.bytes)
        self._spanner = Spanner(self.rows_per_shard)
        self._good_until = [0.0 if self._cache or shard.compression else float("inf") for shard in self._shards]
        self.doing = ""
        self._fetching: dict[int, Future] = {}  # shards that a thread of this process is fetching
        self._fetching_lock = threading.Lock()

    @property
    def is_direct(self) -> bool:
        """Whether all shards are local and uncompressed, so that fetching ahead would not help."""
        return not self._cache and not any(shard.compression for shard in self._shards)

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row."""
        return int(self._spanner[row][0])

    def shard_bytes(self) -> NDArray[np.int64]:
        """Bytes of each shard, uncompressed."""
        return np.array([shard.raw_data.bytes for shard in self._shards], np.int64)

    def prefetch(self, shard_id: int) -> None:
        """Fetches a shard before it is read. An error is ignored here: the read tries again and raises it."""
        with contextlib.suppress(Exception):
            self._ensure(shard_id)

    def read(self, row: int) -> tuple[NDArray, NDArray, NDArray]:
        """(tokens [row_length], starts, documents [documents]) of row number `row`, unsigned and read-only."""
        shard_id, index = self._spanner[row]
        self._stall_timer.progressed()
        self.doing = f"shard {self._shown(shard_id)}"
        try:
            return self._read(shard_id, index)
        finally:
            self.doing = ""

    def _read(self, shard_id: int, index: int) -> tuple[NDArray, NDArray, NDArray]:
        shard = self._shards[shard_id]
        path = self.folder / shard.raw_data.basename
        for attempt in range(3):
            self._ensure(shard_id)
            try:
                return from_sample(shard[index], row_length=self.info.row_length, vocab_size=self.info.vocab_size)
            except _READ_FAULTS as error:
                if not self._cache or attempt == 2:
                    raise unreadable_row(path, index, shard.samples, error) from error
                # A cached copy: another process evicted it, or the disk altered it. It can be fetched again.
                self._good_until[shard_id] = 0.0
                if not isinstance(error, FileNotFoundError):
                    path.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def _ensure(self, shard_id: int) -> None:
        if time.monotonic() < self._good_until[shard_id]:
            return
        shard = self._shards[shard_id]
        if self._cache:
            self._fetch(self._cache, shard_id)
            self._good_until[shard_id] = time.monotonic() + _STILL_THERE_SECONDS
        else:
            self._decompress(shard, self.folder / shard.raw_data.basename)
            self._good_until[shard_id] = float("inf")

    def _fetch(self, cache: Cache, shard_id: int) -> None:
        """Fetches a shard through the cache. Threads that want the same shard share one fetch and its error, so that each
        waits for one stall timeout at most."""
        with self._fetching_lock:
            future = self._fetching.get(shard_id)
            is_new = future is None
            if future is None:
                future = self._fetching[shard_id] = Future()
        if is_new:
            try:
                future.set_result(cache.fetch(self._wanted(self._shards[shard_id])))
            except BaseException as error:
                future.set_exception(error)
            finally:
                with self._fetching_lock:
                    del self._fetching[shard_id]
        future.result()

    def _wanted(self, shard: Any) -> Wanted:
        raw = shard.raw_data
        unpacked = Wanted(f"{self._name}/{raw.basename}", raw.bytes, raw.hashes["sha256"])
        if not shard.zip_data:
            return unpacked
        packed = shard.zip_data
        return Wanted(
            f"{self._name}/{packed.basename}", packed.bytes, packed.hashes["sha256"], unpacked, shard.compression
        )

    def _shown(self, shard_id: int) -> str:
        shard = self._shards[shard_id]
        name = (shard.zip_data or shard.raw_data).basename
        return storage.join(self.info.remote or self.info.path, self._name, name)

    def _decompress(self, shard: Any, path: Path) -> None:
        """Decompresses a local shard next to its compressed file, once per machine, in the first process that needs it.

        The lock is on the compressed file: the kernel drops it with its process, and no lock file remains.
        """
        compressed = self.folder / shard.zip_data.basename
        try:
            with open(compressed, "rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                if path.exists() and path.stat().st_size == shard.raw_data.bytes:
                    return
                data = held.read()
                check_bytes(compressed, data, shard.zip_data.bytes, shard.zip_data.hashes["sha256"])
                data = decompressed(compressed, data, shard.compression)
                temporary = path.with_name(path.name + ".tmp")  # safe while the lock is held
                temporary.write_bytes(data)
                temporary.replace(path)
        except PermissionError as error:
            raise DatasetError(
                f"{path}: cannot be written, and the dataset is compressed ({error.strerror})",
                remedy="make the folder writable, or prepare without compression",
                id="dataset-folder-read-only",
            ) from error
        except OSError as error:
            check_size(compressed, shard.zip_data.bytes)  # raises if it is the compressed file that is missing
            problem, remedy = f"{path}: cannot be written ({error})", "free space for uncompressed shards"
            raise DatasetError(problem, remedy=remedy, id="no-space-to-decompress") from error


def check_index(info: DatasetInfo, split: str) -> None:
    """Raises ShardError unless the split's index.json is the one in dataset.json."""
    path, stored = info.path / split / "index.json", info.split(split).files.get("index.json")
    if stored is None:
        raise ShardError(path, "not in dataset.json", id="index-not-in-dataset")
    check_size(path, stored.bytes)
    check_sha256(path, stored.sha256)


def unreadable_row(shard: object, row: int, rows: int, error: Exception) -> ShardError:
    """The error for row number `row` of a shard of `rows` rows."""
    return ShardError(shard, f"row {row} of {rows} cannot be read ({error})", id="row-unreadable")
