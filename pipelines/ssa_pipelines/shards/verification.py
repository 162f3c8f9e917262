"""Reads every byte of a prepared dataset and compares it with `dataset.json`.

A dataset that passes holds every row that was written, decodable and unaltered. It raises for the first file that is missing,
has another size or sha256, has another number of rows, or cannot be decoded.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssa_pipelines.errors import ShardError
from ssa_pipelines.shards.dataset import DatasetInfo, StoredFile, load_dataset_info
from ssa_pipelines.shards.packing import from_sample
from ssa_pipelines.shards.row_reader import check_index, unreadable_row
from ssa_pipelines.storage.integrity import check_sha256, check_size, decompressed
from ssa_pipelines.storage.shard_cache import Access, Cache, Wanted
from ssa_pipelines.storage.stall_timer import STALL_TIMEOUT

Progress = Callable[[str, int, int | None], None]


def verify(location: str | Path, *, stall_timeout: float = STALL_TIMEOUT, progress: Progress | None = None) -> dict:
    """Checks the whole dataset at `location`; writes nothing. A remote one is downloaded shard by shard, and none is kept.

    progress: called with ("verifying", bytes checked, total bytes) after each shard.
    Returns {"path", "fingerprint", "splits": {name: {"rows", "shards", "bytes"}}}.
    Raises DatasetError for a bad `dataset.json`, ShardError naming the first bad file otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        access = Access(cache=folder, stall_timeout=stall_timeout)
        return _verify(load_dataset_info(location, access), access, progress)


def _verify(info: DatasetInfo, access: Access, progress: Progress | None) -> dict:
    cache = Cache(info.remote, info.path, access) if info.remote else None

    def checked(name: str, stored: StoredFile) -> Path:
        if cache:
            return cache.fetch(Wanted(name, stored.bytes, stored.sha256))
        check_size(info.path / name, stored.bytes)
        check_sha256(info.path / name, stored.sha256)
        return info.path / name

    for name, stored in info.files.items():
        checked(name, stored)
    total = sum(file.bytes for split in info.splits.values() for file in split.files.values())
    done = 0
    report: dict[str, dict] = {}
    for name, split in info.splits.items():
        if cache:
            checked(f"{name}/index.json", split.files["index.json"])
        check_index(info, name)
        folder, rows, shards = info.path / name, 0, 0
        for shard in _shards(info, name):
            stored_name = (shard.zip_data or shard.raw_data).basename
            if stored_name not in split.files:
                raise ShardError(
                    folder / stored_name, "in the index, but not in dataset.json", id="shard-not-in-dataset"
                )
            stored = split.files[stored_name]
            path = checked(f"{name}/{stored_name}", stored)
            rows += _check_rows(info, folder, shard)
            shards += 1
            done += stored.bytes
            if cache:
                path.unlink()
            if progress:
                progress("verifying", done, total)
        if rows != split.rows or shards != len(split.files) - 1:
            problem = f"{shards} shards, {rows} rows; dataset.json: {len(split.files) - 1}, {split.rows}"
            raise ShardError(folder, problem, id="split-miscounted")
        report[name] = {"rows": rows, "shards": shards, "bytes": sum(file.bytes for file in split.files.values())}
    return {"path": info.location, "fingerprint": info.fingerprint, "splits": report}


def _shards(info: DatasetInfo, split: str) -> list:
    from streaming import LocalDataset  # seconds to import

    shards: list = LocalDataset(str(info.path), split).shards
    return shards


def _check_rows(info: DatasetInfo, folder: Path, shard: Any) -> int:
    """Decodes every row of one shard, in a temporary folder if it is compressed. Returns the number of rows."""
    if not shard.zip_data:
        return _decode_rows(info, folder / shard.raw_data.basename, shard)
    left_by_stream = folder / shard.raw_data.basename  # decompressed earlier; streams read this copy
    if left_by_stream.exists():
        check_sha256(left_by_stream, shard.raw_data.hashes["sha256"])
    with tempfile.TemporaryDirectory() as temporary:
        compressed = folder / shard.zip_data.basename
        data = decompressed(compressed, compressed.read_bytes(), shard.compression)
        Path(temporary, shard.raw_data.basename).write_bytes(data)
        shard.dirname, shard.split = temporary, ""
        return _decode_rows(info, compressed, shard)


def _decode_rows(info: DatasetInfo, shown: Path, shard: Any) -> int:
    raw = Path(shard.dirname, shard.split, shard.raw_data.basename)
    with open(raw, "rb") as file:
        header = int.from_bytes(file.read(4), "little")  # MDS begins with the number of samples, uint32
    if header != shard.samples:
        raise ShardError(shown, f"{header} rows in its header, {shard.samples} in the index", id="shard-miscounted")
    for index in range(shard.samples):
        try:
            from_sample(shard[index], row_length=info.row_length, vocab_size=info.vocab_size)
        except (OSError, ValueError, IndexError, KeyError, TypeError, EOFError) as error:
            raise unreadable_row(shown, index, shard.samples, error) from error
    return int(shard.samples)
