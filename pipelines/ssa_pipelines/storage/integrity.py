"""Size and sha256 of a file or of its contents against what a dataset's record says; any difference is a ShardError."""

import hashlib
import os
from pathlib import Path

from ssa_pipelines.errors import ShardError


def check_size(path: Path, expected: int) -> None:
    """Raises ShardError unless the file exists with this many bytes."""
    try:
        found = os.stat(path).st_size
    except FileNotFoundError:
        raise ShardError(path, "missing") from None
    _compare_size(path, found, expected)


def check_sha256(path: Path, expected: str) -> None:
    """Raises ShardError unless the file's sha256 is this."""
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ShardError(path, f"cannot be read ({error.strerror})") from error
    _compare_sha256(path, found, expected)


def check_bytes(shown: object, data: bytes, size: int, sha256: str) -> None:
    """Raises ShardError unless a file's contents are of this size and sha256."""
    _compare_size(shown, len(data), size)
    _compare_sha256(shown, hashlib.sha256(data).hexdigest(), sha256)


def _compare_size(shown: object, found: int, expected: int) -> None:
    if found != expected:
        kind = "truncated" if found < expected else "too long"
        raise ShardError(shown, f"{kind}: {found} bytes, {expected} expected")


def _compare_sha256(shown: object, found: str, expected: str) -> None:
    if found != expected:
        raise ShardError(shown, f"contents changed: sha256 {found[:16]}..., {expected[:16]}... expected")
