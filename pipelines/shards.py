"""Random access to the rows of a prepared split, through mosaicml-streaming's own Stream and MDS reader.

A row either comes back exactly as it was written or raises a ShardError that names the shard: sizes are compared with
`dataset.json` on opening, and every row with its checksum on reading. It uses no shared memory, locks or processes of
streaming's, so there is nothing for a killed job to leave behind or for a neighbour to trip over.
"""

import fcntl
import hashlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import DatasetInfo
from pipelines.errors import DatasetError, ShardError
from pipelines.packing import from_sample

# streaming.StreamingDataset ends an epoch early without a word when a shard is missing or damaged (0.13.0), and keeps
# its epoch in /dev/shm objects that survive kill -9; its Stream and readers, one layer below, raise and keep nothing.
_READ_FAULTS = (OSError, ValueError, IndexError, KeyError, TypeError, EOFError)


class RowReader:
    """The rows of one split, by number.

    Raises ShardError: on opening, if a shard or the index is missing or of the wrong size; on reading a damaged row.
    """

    def __init__(self, info: DatasetInfo, split: str):
        from streaming import Stream  # imports torchvision and more: seconds, so only where shards are read
        from streaming.base.spanner import Spanner
        from streaming.base.world import World

        self.info, self.split = info, info.split(split)
        self.folder = info.path / split
        check_index(info, split)
        self._stream = Stream(local=str(info.path), split=split, validate_hash="sha256", keep_zip=True)
        self._stream.apply_default({"split": split, "download_retry": 2, "download_timeout": 60})
        self._shards = self._stream.get_shards(World(1, 1, 1, 0), allow_unsafe_types=False)
        self.rows_per_shard = np.array([shard.samples for shard in self._shards], np.int64)
        self.rows = int(self.rows_per_shard.sum())
        if self.rows != self.split.rows:
            raise ShardError(self.folder / "index.json", f"lists {self.rows} rows, dataset.json {self.split.rows}")
        for name in self.split.files:
            check_size(self.folder / name, self.split.files[name].bytes)
        self._spanner = Spanner(self.rows_per_shard)
        self._ready = [not shard.compression for shard in self._shards]

    def read(self, row: int) -> tuple[NDArray, NDArray, NDArray]:
        """(tokens [row_length], starts, documents [documents]) of row number `row`, unsigned and read-only."""
        shard_id, index = self._spanner[row]
        shard = self._shards[shard_id]
        path = self.folder / shard.raw_data.basename
        if not self._ready[shard_id]:
            self._decompress(shard, path)
            self._ready[shard_id] = True
        try:
            return from_sample(shard[index], row_length=self.info.row_length, vocab_size=self.info.vocab_size)
        except _READ_FAULTS as error:
            raise ShardError(path, f"row {index} of {shard.samples} cannot be read ({error})") from error

    def _decompress(self, shard, path: Path) -> None:
        """Has streaming decompress a shard beside its compressed form, once a machine, whichever process comes first.

        The lock lies on the compressed file itself: the kernel drops it with the process, and no lock file remains.
        """
        compressed = self.folder / shard.zip_data.basename
        try:
            with open(compressed, "rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX)
                if path.exists() and path.stat().st_size != shard.raw_data.bytes:
                    path.unlink()
                self._stream.prepare_shard(shard)
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
        except Exception as error:  # the decompressors each have an error type of their own
            raise ShardError(compressed, f"cannot be decompressed ({error})") from error
        check_size(path, shard.raw_data.bytes)


def check_index(info: DatasetInfo, split: str) -> None:
    """Raises ShardError unless the split's index.json is the one dataset.json knows."""
    path, stored = info.path / split / "index.json", info.split(split).files.get("index.json")
    if stored is None:
        raise ShardError(path, "dataset.json does not know it")
    check_size(path, stored.bytes)
    check_sha256(path, stored.sha256)


def check_size(path: Path, expected: int) -> None:
    """Raises ShardError unless the file exists with this many bytes."""
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise ShardError(path, "missing") from None
    if found != expected:
        kind = "truncated" if found < expected else "too long"
        raise ShardError(path, f"{kind}: {found} bytes, {expected} expected")


def check_sha256(path: Path, expected: str) -> None:
    """Raises ShardError unless the file's sha256 is this."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ShardError(path, f"cannot be read ({error.strerror})") from error
    if found != expected:
        raise ShardError(path, f"contents changed: sha256 {found[:16]}..., {expected[:16]}... expected")
