"""Random access to the rows of a prepared split, through mosaicml-streaming's own MDS reader.

A row either comes back exactly as it was written or raises a ShardError that names the shard: sizes are compared with
`dataset.json` on opening, remote shards with their sha256 on arrival, and every row with its checksum on reading. It uses
no shared memory and no processes, so there is nothing for a killed job to leave behind or for a neighbour to trip over.
"""

import contextlib
import fcntl
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import DatasetError, ShardError
from ssa_pipelines.shards.dataset import DatasetInfo
from ssa_pipelines.shards.packing import from_sample
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.storage.integrity import check_bytes, check_sha256, check_size
from ssa_pipelines.storage.shard_cache import Access, Cache, Wanted
from ssa_pipelines.storage.stall_timer import StallTimer

# streaming.StreamingDataset ends an epoch early without a word when a shard is missing or damaged (0.13.0), and keeps
# its epoch in /dev/shm objects that survive kill -9; its readers, one layer below, raise and keep nothing.
_READ_FAULTS = (OSError, ValueError, IndexError, KeyError, TypeError, EOFError)
_STILL_THERE_SECONDS = 5.0  # how long a shard of the cache is taken to be there, and its use not noted again


class RowReader:
    """The rows of one split, by number.

    Raises ShardError: on opening, if the index or a local shard is missing or of the wrong size; on reading a damaged row
    or a remote shard that cannot be had. `doing` says what a read that takes long is waiting for, "" while there is none.
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
        self._shards = [reader_from_json(str(info.path), split, entry) for entry in entries]
        for shard in self._shards:
            shard.validate(False)  # no column may hold a pickle
        self.rows_per_shard = np.array([shard.samples for shard in self._shards], np.int64)
        self.rows = int(self.rows_per_shard.sum())
        if self.rows != self.split.rows:
            raise ShardError(self.folder / "index.json", f"lists {self.rows} rows, dataset.json {self.split.rows}")
        if not self._cache:
            for name, file in stored.items():
                check_size(self.folder / name, file.bytes)
        self._spanner = Spanner(self.rows_per_shard)
        self._good_until = [0.0 if self._cache or shard.compression else float("inf") for shard in self._shards]
        self.doing = ""
        self._coming: dict[int, Future] = {}  # shards that a thread of ours is fetching
        self._coming_lock = threading.Lock()

    @property
    def is_direct(self) -> bool:
        """Whether all shards lie here ready to be read, so that nothing is won by asking for them early."""
        return not self._cache and not any(shard.compression for shard in self._shards)

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row."""
        return self._spanner[row][0]

    def shard_bytes(self) -> NDArray[np.int64]:
        """Bytes of each shard, uncompressed."""
        return np.array([shard.raw_data.bytes for shard in self._shards], np.int64)

    def bring(self, shard_id: int) -> None:
        """Has a shard ready before it is read. What fails now may be had by then, so the read tries again."""
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
                    raise ShardError(path, f"row {index} of {shard.samples} cannot be read ({error})") from error
                # A copy of ours: another process made room, or the disk altered it. It can be fetched again.
                self._good_until[shard_id] = 0.0
                if not isinstance(error, FileNotFoundError):
                    path.unlink(missing_ok=True)
        raise AssertionError("unreachable")

    def _ensure(self, shard_id: int) -> None:
        if time.monotonic() < self._good_until[shard_id]:
            return
        shard = self._shards[shard_id]
        if self._cache:
            self._fetch(shard_id)
            self._good_until[shard_id] = time.monotonic() + _STILL_THERE_SECONDS
        else:
            self._decompress(shard, self.folder / shard.raw_data.basename)
            self._good_until[shard_id] = float("inf")

    def _fetch(self, shard_id: int) -> None:
        """Has the cache bring a shard. Whoever wants one that another thread of ours is fetching shares what becomes of it:
        it must neither wait a second stall timeout, nor hear of less than the trouble there is."""
        with self._coming_lock:
            coming = self._coming.get(shard_id)
            ours = coming is None
            if ours:
                coming = self._coming[shard_id] = Future()
        if ours:
            try:
                coming.set_result(self._cache.fetch(self._wanted(self._shards[shard_id])))
            except BaseException as error:
                coming.set_exception(error)
            finally:
                with self._coming_lock:
                    del self._coming[shard_id]
        coming.result()

    def _wanted(self, shard) -> Wanted:
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

    def _decompress(self, shard, path: Path) -> None:
        """Decompresses a local shard beside its compressed form, once a machine, whichever process comes first.

        The lock lies on the compressed file itself: the kernel drops it with the process, and no lock file remains.
        """
        from streaming.base.compression import decompress

        compressed = self.folder / shard.zip_data.basename
        try:
            with open(compressed, "rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                if path.exists() and path.stat().st_size == shard.raw_data.bytes:
                    return
                data = held.read()
                check_bytes(compressed, data, shard.zip_data.bytes, shard.zip_data.hashes["sha256"])
                try:
                    data = decompress(shard.compression, data)
                except Exception as error:  # the decompressors each have an error type of their own
                    raise ShardError(compressed, f"cannot be decompressed ({error})") from error
                temporary = path.with_name(path.name + ".tmp")  # ours alone while the lock is held
                temporary.write_bytes(data)
                temporary.replace(path)
        except PermissionError as error:
            raise DatasetError(
                f"{path}: cannot be written, and the dataset is compressed ({error.strerror})",
                remedy="make the folder writable, or prepare without compression",
            ) from error
        except OSError as error:
            if not compressed.exists():
                raise ShardError(compressed, "missing") from error
            raise DatasetError(
                f"{path}: cannot be written ({error})", remedy="free space for uncompressed shards"
            ) from error


def check_index(info: DatasetInfo, split: str) -> None:
    """Raises ShardError unless the split's index.json is the one dataset.json knows."""
    path, stored = info.path / split / "index.json", info.split(split).files.get("index.json")
    if stored is None:
        raise ShardError(path, "dataset.json does not know it")
    check_size(path, stored.bytes)
    check_sha256(path, stored.sha256)
