"""Files here and in object stores, under one way of naming them: a path, or a URL such as `s3://bucket/key`.

Listing, sizes, uploads and streamed reads go through boto3, shard downloads through streaming's own downloaders (see
cache.py). `S3_ENDPOINT_URL` names a server other than Amazon's, as it does for streaming. What may pass is tried again for a
while; a server that is gone or silent is an error within 30 s. It refuses schemes that it cannot list and names every object
it could not reach.
"""

import fnmatch
import functools
import io
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from urllib.parse import urlparse

from ssa_pipelines.errors import DataError, DatasetError

CONNECT_SECONDS, READ_SECONDS = 5.0, 7.0  # of silence, in one request
TROUBLE_SECONDS = 10.0  # after a request's failure, in which it is made again; with two silences it stays under 30
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 4.0
_READ_AHEAD = 1 << 20  # bytes of an object that are asked of the socket at once
Result = TypeVar("Result")


class Stored(NamedTuple):
    """One object: its URL and its size in bytes."""

    name: str
    size: int


def is_remote(name: str | Path) -> bool:
    """Whether this names an object in a store and not a file here."""
    return "://" in str(name)


def join(folder: str | Path, *names: str) -> str:
    """`folder` and names below it, for paths and URLs alike."""
    return "/".join([str(folder).rstrip("/"), *names])


@functools.cache
def s3_client():
    """One client a process; clients may be used by several threads, but not across a fork."""
    import boto3
    from botocore.config import Config

    # `patiently` tries again: botocore counts attempts, and five that each meet silence take minutes
    retries = {"mode": "standard", "total_max_attempts": 1}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=config)


os.register_at_fork(after_in_child=s3_client.cache_clear)


def patiently(request: Callable[[], Result]) -> Result:
    """request(), made again with growing pauses while what it meets may pass: no connection, silence, a busy server.

    Raises its error when it is another, or TROUBLE_SECONDS after the first.
    """
    since, pause = None, _FIRST_PAUSE
    while True:
        try:
            return request()
        except Exception as error:
            since = since or time.monotonic()
            if not _may_pass(error) or time.monotonic() - since + pause > TROUBLE_SECONDS:
                raise
        time.sleep(pause * random.uniform(0.5, 1))  # processes that failed together do not come back together
        pause = min(2 * pause, _LONGEST_PAUSE)


def _may_pass(error: BaseException) -> bool:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import ClientError, HTTPClientError
    from urllib3.exceptions import HTTPError

    if isinstance(error, Boto3Error):  # what an upload makes of any of the others
        return error.__context__ is not None and _may_pass(error.__context__)
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429)
    return isinstance(error, HTTPClientError | HTTPError | ConnectionError)


def open_binary(name: str | Path) -> BinaryIO:
    """Opens a file or an S3 object for reading; both can seek, and an object is read in pieces as asked for."""
    if not is_remote(name):
        return open(name, "rb")
    return io.BufferedReader(_Object(str(name)), _READ_AHEAD)


def _as_of_a_file(request: Callable[[], Result]) -> Result:
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        return patiently(request)
    except (BotoCoreError, ClientError, HTTPError) as error:  # readers of files know what to do with an OSError
        raise OSError(str(error)) from error


class _Object(io.RawIOBase):
    """An S3 object, read through one connection from wherever it is read on; a connection that breaks is made again there.

    Raises OSError when that does not help, and for an object replaced while it is read.
    """

    def __init__(self, name: str):
        url = urlparse(name)
        if url.scheme != "s3":
            raise DataError(f"{name}: {url.scheme}:// cannot be read", remedy="use s3://, or copy the file here")
        self._key = {"Bucket": url.netloc, "Key": name.removeprefix(f"s3://{url.netloc}/")}
        found = _as_of_a_file(lambda: s3_client().head_object(**self._key))
        self._size, self._version, self._at, self._body = found["ContentLength"], found["ETag"], 0, None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset != self._at:
            self._hang_up()
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = _as_of_a_file(lambda: self._piece(wanted))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _piece(self, wanted: int) -> bytes:
        try:
            if self._body is None:
                found = s3_client().get_object(**self._key, Range=f"bytes={self._at}-", IfMatch=self._version)
                self._body = found["Body"]
            if data := self._body.read(wanted):
                return data
            raise ConnectionError(f"it ends after {self._at} of {self._size} bytes")
        except BaseException:
            self._hang_up()
            raise

    def _hang_up(self) -> None:
        body, self._body = getattr(self, "_body", None), None
        if body is not None:
            body.close()


def find(pattern: str) -> list[Stored]:
    """S3 objects under a URL, in name order: one object, everything below a prefix, or what a pattern matches.

    Raises DataError for another scheme or a store that cannot be reached.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    url = urlparse(pattern)
    if url.scheme != "s3":
        raise DataError(f"{pattern}: {url.scheme}:// cannot be listed", remedy="use s3://, or copy the files here")
    key = url.path.lstrip("/") + (f"?{url.query}" if url.query else "")  # `?` is a wildcard here, not a query
    literal = re.match(r"[^*?\[]*", key)[0]
    found = []
    try:
        for page in _pages(url.netloc, literal):
            for entry in page.get("Contents", ()):
                name = entry["Key"]
                below = name == key or name.startswith(key.rstrip("/") + "/") or not key
                if below if literal == key else fnmatch.fnmatchcase(name, key):
                    found.append(Stored(f"s3://{url.netloc}/{name}", entry["Size"]))
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"{pattern}: cannot be listed ({error})", remedy=ACCESS) from error
    return sorted(found)


def _pages(bucket: str, prefix: str) -> Iterator[dict]:
    further = {}
    while further is not None:
        page = patiently(functools.partial(s3_client().list_objects_v2, Bucket=bucket, Prefix=prefix, **further))
        yield page
        further = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None


def exists(name: str | Path) -> bool:
    """Whether the file or the S3 object is there. Raises DatasetError for a store that cannot be reached."""
    if not is_remote(name):
        return os.path.lexists(name)
    try:
        return any(stored.name == str(name) for stored in find(str(name)))
    except DataError as error:
        raise DatasetError(error.problem, remedy=error.remedy) from error


def upload(local: Path, name: str) -> None:
    """Copies a file to an S3 object; the store checks a CRC of every piece. Raises DatasetError when it cannot."""
    from boto3.exceptions import Boto3Error
    from boto3.s3.transfer import TransferConfig
    from botocore.exceptions import BotoCoreError, ClientError

    url = urlparse(name)
    if url.scheme != "s3":
        raise DatasetError(f"{name}: {url.scheme}:// cannot be written", remedy="use s3:// or a local folder")
    try:
        # no threads of its own: prepare already runs one process a core
        config = TransferConfig(use_threads=False)
        patiently(lambda: s3_client().upload_file(str(local), url.netloc, url.path.lstrip("/"), Config=config))
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise DatasetError(f"{name}: cannot be uploaded ({error})", remedy=ACCESS) from error


def fsync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable. A file system that cannot sync a folder is let be."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


ACCESS = "check S3_ENDPOINT_URL, the credentials, the bucket and the network, then try again"
