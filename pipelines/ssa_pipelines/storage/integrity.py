"""Compares size and sha256 of a file, or of its contents, with those in a dataset's record. A difference is a ShardError."""

import hashlib
import os
from pathlib import Path

from ssa_pipelines.errors import ShardError


def check_size(path: Path, expected: int) -> None:
    """Raises ShardError unless the file exists with this many bytes."""
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise ShardError(path, "missing", id="shard-missing") from None
    _compare_size(path, found, expected)


def check_sha256(path: Path, expected: str) -> None:
    """Raises ShardError unless the file's sha256 is this."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ShardError(path, f"cannot be read ({error.strerror})", id="shard-unreadable") from error
    _compare_sha256(path, found, expected)


def check_bytes(shown: object, data: bytes, size: int, sha256: str) -> None:
    """Raises ShardError unless a file's contents have this size and sha256."""
    _compare_size(shown, len(data), size)
    _compare_sha256(shown, hashlib.sha256(data).hexdigest(), sha256)


def decompressed(shown: object, data: bytes, compression: str) -> bytes:
    """The uncompressed contents of a shard. Raises ShardError when they cannot be decompressed."""
    from streaming.base.compression import decompress  # seconds to import

    try:
        contents: bytes = decompress(compression, data)
    except Exception as error:  # each decompressor has its own error type
        raise ShardError(shown, f"cannot be decompressed ({error})", id="shard-not-decompressed") from error
    return contents


def _compare_size(shown: object, found: int, expected: int) -> None:
    if found < expected:
        raise ShardError(shown, f"truncated: {found} bytes, {expected} expected", id="shard-truncated")
    if found > expected:
        raise ShardError(shown, f"too long: {found} bytes, {expected} expected", id="shard-too-long")


def _compare_sha256(shown: object, found: str, expected: str) -> None:
    if found != expected:
        problem = f"contents changed: sha256 {found[:16]}..., {expected[:16]}... expected"
        raise ShardError(shown, problem, id="shard-altered")
