"""Compressions of corpus files by suffix: one class per compression in COMPRESSIONS.

Text comes out whole or a CorpusError names the file: a truncated or damaged file never reads as a shorter one.
"""

import gzip
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import BinaryIO, cast

from ssa_pipelines.errors import CorpusError
from ssa_pipelines.storage import object_store as storage

REFUSED = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".sz", ".snappy", ".zip", ".7z")  # recognised, but not read


class Compression(ABC):
    """Decompresses one kind of file while it is read."""

    @classmethod
    def faults(cls) -> tuple[type[Exception], ...]:
        """What reading a damaged file raises."""
        return (OSError, EOFError, zlib.error)

    @classmethod
    @abstractmethod
    def open(cls, raw: BinaryIO, size: int) -> AbstractContextManager[BinaryIO]:
        """The decompressed bytes of an open file of `size` bytes."""


class Gzip(Compression):
    @classmethod
    def open(cls, raw: BinaryIO, size: int) -> AbstractContextManager[BinaryIO]:
        if not size:  # Python reads it as no text, and no compressor writes it
            raise EOFError("it is empty, and even compressed nothing takes 20 bytes")
        return cast(AbstractContextManager[BinaryIO], gzip.open(raw))


class Zstandard(Compression):
    """Uses backports.zstd: `zstandard` and `zstd` read a truncated file without an error."""

    @classmethod
    def faults(cls) -> tuple[type[Exception], ...]:
        from backports import zstd

        return (*super().faults(), zstd.ZstdError)

    @classmethod
    def open(cls, raw: BinaryIO, size: int) -> AbstractContextManager[BinaryIO]:
        from backports import zstd

        return cast(AbstractContextManager[BinaryIO], zstd.open(raw))


COMPRESSIONS: dict[str, type[Compression]] = {".gz": Gzip, ".zst": Zstandard}


@contextmanager
def opened(path: str, compression: str, size: int) -> Iterator[BinaryIO]:
    """A file's bytes, decompressed. Damage found while reading raises a CorpusError that names the file."""
    kind = COMPRESSIONS[compression] if compression else None
    faults = kind.faults() if kind else (OSError, EOFError)
    try:
        with storage.open_binary(path) as raw:
            if kind is None:
                yield raw
            else:
                with kind.open(raw, size) as data:
                    yield data
    except faults as error:
        raise unreadable(path, error) from error


def unreadable(path: str, error: Exception) -> CorpusError:
    """The error for a file that is damaged or out of reach."""
    remedy = "restore the file, or leave it out"
    if storage.is_remote(path) and type(error) is OSError:  # the store failed, not the file
        remedy = storage.ACCESS
    return CorpusError(f"{path}: cannot be read ({error})", remedy=remedy, id="corpus-unreadable")
