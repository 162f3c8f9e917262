"""Local cache of the files of remote datasets: checked, shared by the processes of a machine, and kept under a size limit.

A file is in the cache complete and with the right sha256, or not at all. Transient
errors (lost connection, busy or stalled server, garbled transfer) are retried within the stall timeout (stall_timer.py).
Permanent ones (no such object, no access, wrong contents twice) raise ShardError at once. Only own files are removed.
"""

import errno
import fcntl
import functools
import os
import random
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ssa_pipelines.errors import DatasetError, ShardError
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.storage.integrity import check_bytes, check_sha256, decompressed
from ssa_pipelines.storage.prefetch import start
from ssa_pipelines.storage.stall_timer import STALL_TIMEOUT, Arrival, StallTimer

_LOCKS = 64  # lock files per cache folder; never removed, because a lock on a removed file excludes no other process
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 5.0  # seconds; not longer, since the stall timer may start during a pause
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)
_PERMANENT = {"403", "404", "AccessDenied", "NoSuchKey", "NoSuchBucket", "InvalidAccessKeyId", "SignatureDoesNotMatch"}


class Access(NamedTuple):
    """How a process reaches remote datasets.

    cache: folder for their files, `~/.cache/ssa-megatron` by default; processes and jobs may share it.
    cache_limit: bytes of the shards in it, in addition to those being fetched; None for no limit. The least recently used
        are removed first.
    stall_timeout: seconds of failures with one file (no connection, errors, silence) after which it is an error. Only time
        in which training is blocked and no bytes arrive counts.
    """

    cache: str | Path | None = None
    cache_limit: int | None = None
    stall_timeout: float = STALL_TIMEOUT

    @property
    def root(self) -> Path:
        return Path(self.cache) if self.cache else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "ssa-megatron")


class Wanted(NamedTuple):
    """A file of a dataset: name, size in bytes, sha256; of a compressed shard also the file it unpacks to, and how."""

    name: str
    size: int
    sha256: str
    unpacked: "Wanted | None" = None
    compression: str | None = None


class Cache:
    """The files of one remote dataset in one folder of this machine.

    stall_timer: of the consumer of these files; by default the caller of `fetch` counts as blocked.
    """

    def __init__(self, remote: str, folder: Path, access: Access, stall_timer: StallTimer | None = None):
        self.remote, self.folder, self._limit = remote.rstrip("/"), folder, access.cache_limit
        self._root, self._parts = access.root.expanduser(), folder / ".parts"
        self._stall_timer = stall_timer or StallTimer(access.stall_timeout)

    def fetch(self, wanted: Wanted) -> Path:
        """Path of the local copy, unpacked if the file is compressed. Raises ShardError or DatasetError, naming it."""
        target = self.folder / (wanted.unpacked or wanted).name
        if _is_there(target, wanted):
            return target
        try:
            with self._locked(wanted.name) as since:
                if not _is_there(target, wanted):
                    self._clean(wanted.name)
                    self._fetch_locked(wanted, target, since)
        except OSError as error:
            raise DatasetError(
                f"{target}: cannot be written ({error.strerror or error}); {wanted.name} of {self.remote} goes there",
                remedy="free space there, or name another folder with data.cache",
                id="cache-not-written",
            ) from error
        return target

    def _fetch_locked(self, wanted: Wanted, target: Path, since: float) -> None:
        url = storage.join(self.remote, wanted.name)
        for needed in (target.parent, self._parts):
            needed.mkdir(parents=True, exist_ok=True)
        if wanted.unpacked:
            self._make_room(wanted.size + wanted.unpacked.size)
        elif target.suffix == ".mds":
            self._make_room(wanted.size)
        damaged = False
        while True:
            part = self._parts / f"{_flat(wanted.name)}.{uuid.uuid4().hex}.part"
            try:
                _download(url, part, self._stall_timer, since)
                data = part.read_bytes()
                check_bytes(url, data, wanted.size, wanted.sha256)
                if wanted.unpacked:
                    part.write_bytes(_unpack(url, data, wanted))
                part.rename(target)
                return
            except ShardError as error:
                if damaged or error.__cause__ is not None:
                    raise
                damaged = True  # the transfer may have damaged it once
            except OSError as error:
                if error.errno != errno.ENOSPC or not self._evict(2 * wanted.size):
                    raise
            finally:
                with suppress(OSError):
                    part.unlink()
            since = time.monotonic()  # something arrived

    def _make_room(self, need: int) -> None:
        limit = self._limit
        if limit is not None:
            if need > limit:
                raise DatasetError(
                    f"{self._root}: the cache limit of {limit:,} bytes cannot hold a shard of {need:,}",
                    remedy="raise data.cache_limit to several shards",
                    id="cache-limit-below-shard",
                )
            self._evict(need - (limit - sum(size for _, size, _ in self._shards())))

    def _evict(self, amount: int) -> int:
        """Removes the least recently used shards until `amount` bytes are free; returns how many bytes it removed."""
        freed = 0
        for _, size, path in sorted(self._shards()):
            if freed >= amount:
                break
            with suppress(OSError):  # another process removed it
                path.unlink()
                freed += size
        return freed

    def _shards(self) -> Iterator[tuple[float, int, Path]]:
        """(time of last use, bytes, path) of the shards of all datasets in the cache."""
        for path in self._root.glob("*/*/shard.*.mds"):
            with suppress(OSError):
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path

    def _clean(self, name: str) -> None:
        """Removes what a process left behind that died while it held this file's lock."""
        for path in self._parts.glob(f"{_flat(name)}.*.part*"):
            with suppress(OSError):
                path.unlink()

    @contextmanager
    def _locked(self, name: str) -> Iterator[float]:
        """Lets only one process fetch a file; the kernel drops the lock with its owner. Yields since when nothing arrived."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        since, arrival = time.monotonic(), None
        with open(locks / str(sum(name.encode()) % _LOCKS), "a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    arrival = arrival or Arrival(self._parts, "", self._stall_timer)  # some files share a lock
                    if arrival.seen():
                        since = time.monotonic()
                    if self._stall_timer.left(since) <= 0:
                        url, seconds = storage.join(self.remote, name), self._stall_timer.seconds
                        problem = f"not fetched within {seconds:g} s: another process of this machine fetches it without progress"
                        raise ShardError(url, problem, remedy=_REACH, id="shard-locked") from None
                    time.sleep(0.02)
            yield since


@functools.cache
def _downloader(scheme: str):
    """streaming's downloader for s3://, gs://, ...: one per process, since making a client takes half a second."""
    from streaming.base.storage import CloudDownloader

    return CloudDownloader.get(f"{scheme}://")


os.register_at_fork(after_in_child=_downloader.cache_clear)


def read_remote(url: str, access: Access) -> bytes:
    """The contents of a small remote file of unknown size and sha256. Raises ShardError when it cannot be fetched."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "file.part")
        _download(url, part, StallTimer(access.stall_timeout), time.monotonic())
        return part.read_bytes()


def _download(url: str, target: Path, stall_timer: StallTimer, since: float) -> None:
    """Downloads one object to `target`. Raises ShardError with a cause when it cannot be fetched, OSError for a full disk.

    since: when it was first wanted, or part of it last arrived, on the clock of time.monotonic().
    """
    arrival = Arrival(target.parent, target.stem, stall_timer)
    silence = stall_timer.seconds / 2  # leaves time for two attempts
    pause, reason, number = _FIRST_PAUSE, "no answer", 0
    while True:
        number += 1
        attempt = _Attempt(url, Path(f"{target}.{number}"), silence)
        try:
            while not attempt.is_over():
                if arrival.seen():
                    since = attempt.moved = time.monotonic()
                if stall_timer.left(since) <= 0:
                    raise TimeoutError
            attempt.path.rename(target)
            return
        except Exception as error:  # the library of each store has its own errors
            attempt.give_up()
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise
            code = getattr(error, "response", {}).get("Error", {}).get("Code")
            if not isinstance(error, TimeoutError):
                reason = str(error) or type(error).__name__
            if code in _PERMANENT or isinstance(error, FileNotFoundError):
                problem = f"does not exist, or no access ({code}: {reason})"
                raise ShardError(url, problem, remedy=_REACH, id="object-missing") from error
            left = stall_timer.left(since)
            if left <= _FIRST_PAUSE:
                problem = f"not fetched within {stall_timer.seconds:g} s ({reason})"
                raise ShardError(url, problem, remedy=_REACH, id="object-stalled") from error
        time.sleep(min(pause, left) * random.uniform(0.5, 1))  # ranks that failed together must not retry together
        pause = min(2 * pause, _LONGEST_PAUSE)


class _Attempt:
    """One download to a separate file, by a thread that may hang. After `give_up` it removes its file whenever it ends.

    silence: seconds without progress after which `is_over` raises TimeoutError.
    """

    def __init__(self, url: str, path: Path, silence: float):
        self.path, self.moved = path, time.monotonic()
        self._url, self._silence, self._given_up = url, silence, False
        self._future = start(self._run)

    def is_over(self) -> bool:
        """Whether the download has ended, after waiting for 0.1 s. Raises what the download raised."""
        try:
            self._future.result(0.1)
            return True
        except TimeoutError:
            if self._future.done() or time.monotonic() - self.moved > self._silence:
                raise
            return False

    def give_up(self) -> None:
        self._given_up = True
        self.path.unlink(missing_ok=True)

    def _run(self) -> None:
        _downloader(self._url.split("://")[0]).download(self._url, str(self.path), self._silence)
        if self._given_up:
            self.path.unlink(missing_ok=True)


def _flat(name: str) -> str:
    """A dataset's file name, which may contain slashes, as a name within one folder."""
    return name.replace("/", "-")


def _unpack(url: str, data: bytes, wanted: Wanted) -> bytes:
    assert wanted.unpacked is not None
    assert wanted.compression is not None
    data = decompressed(url, data, wanted.compression)
    check_bytes(url, data, wanted.unpacked.size, wanted.unpacked.sha256)
    return data


def _is_there(target: Path, wanted: Wanted) -> bool:
    """Whether the file is in the cache; marks it as just used.

    Rows of a shard have checksums. Other files are small and checked here, so that one altered by the disk is fetched again.
    """
    try:
        if target.stat().st_size != (wanted.unpacked or wanted).size:
            return False
        if target.suffix != ".mds":
            check_sha256(target, wanted.sha256)
        os.utime(target)
        return True
    except (OSError, ShardError):
        return False


_REACH = "check the object, S3_ENDPOINT_URL, the credentials and the network; the same command continues"
