"""Files here and in object stores under one kind of name: a path, or a URL such as `s3://bucket/key`.

One module per URL scheme in stores/. Shard downloads use streaming's own downloaders instead (shard_cache.py). It refuses
unknown schemes and names every object it could not reach.
"""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ssa_pipelines.errors import DataError, DatasetError
from ssa_pipelines.registry import Registry

ACCESS = "check S3_ENDPOINT_URL, the credentials, the bucket and the network, then try again"


class Stored(NamedTuple):
    """One object: its URL and its size in bytes."""

    name: str
    size: int


class ObjectStore(ABC):
    """A store behind one URL scheme. Objects are identified by their URL."""

    @classmethod
    @abstractmethod
    def open_binary(cls, name: str) -> BinaryIO:
        """A seekable stream that reads an object in pieces as asked for. Raises OSError."""

    @classmethod
    @abstractmethod
    def find(cls, pattern: str) -> list[Stored]:
        """Objects in name order: one object, everything below a prefix, or what a pattern matches. Raises DataError."""

    @classmethod
    @abstractmethod
    def upload(cls, local: Path, name: str) -> None:
        """Copies a file to an object; the store checks a CRC of every piece. Raises DatasetError."""


STORES: Registry[type[ObjectStore]] = Registry("ssa_pipelines.storage.stores")


def store_of(name: str | Path) -> type[ObjectStore]:
    """The store that a URL names. Raises DataError for an unknown scheme."""
    scheme = str(name).partition("://")[0]
    store = STORES.get(scheme)
    if store is None:
        known = ", ".join(f"{scheme}://" for scheme in STORES.names())
        problem, remedy = f"{name}: {scheme}:// is not supported", f"use {known}, or copy the files here"
        raise DataError(problem, remedy=remedy, id="unknown-storage-scheme")
    return store


def is_remote(name: str | Path) -> bool:
    """Whether this names an object in a store, not a local file."""
    return "://" in str(name)


def join(folder: str | Path, *names: str) -> str:
    """`folder` and names below it, for paths and URLs alike."""
    return "/".join([str(folder).rstrip("/"), *names])


def open_binary(name: str | Path) -> BinaryIO:
    """Opens a file or an object for reading; both can seek. Raises OSError, DataError for an unknown scheme."""
    if not is_remote(name):
        return open(name, "rb")
    return store_of(name).open_binary(str(name))


def find(pattern: str) -> list[Stored]:
    """Objects under a URL in name order; see ObjectStore.find. Raises DataError."""
    return store_of(pattern).find(pattern)


def exists(name: str | Path) -> bool:
    """Whether the file or the object exists. Raises DatasetError for a store that cannot be reached."""
    if not is_remote(name):
        return os.path.lexists(name)
    try:
        return any(stored.name == str(name) for stored in find(str(name)))
    except DataError as error:
        raise DatasetError(error.problem, remedy=error.remedy, id=error.id) from error


def upload(local: Path, name: str) -> None:
    """Copies a file to an object; see ObjectStore.upload. Raises DataError, DatasetError."""
    store_of(name).upload(local, name)


def fsync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable. Ignores a file system that cannot sync a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)
