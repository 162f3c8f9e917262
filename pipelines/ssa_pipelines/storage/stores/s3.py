"""Objects in S3 or a compatible store, through boto3. `S3_ENDPOINT_URL` names a server other than Amazon's.

Transient errors are retried for a while; a server that is gone or silent is an error within 30 s. Every error names the
object.
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
from typing import Any, BinaryIO, TypeVar, cast
from urllib.parse import urlparse

from ssa_pipelines.errors import DataError, DatasetError
from ssa_pipelines.storage.object_store import ACCESS, STORES, ObjectStore, Stored

CONNECT_SECONDS, READ_SECONDS = 5.0, 7.0  # of silence per request
TROUBLE_SECONDS = 10.0  # of retries after a request failed; with two silences the total stays under 30
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 4.0
_READ_AHEAD = 1 << 20  # bytes of an object requested from the socket at once
Result = TypeVar("Result")


@STORES.register("s3")
class S3(ObjectStore):
    @classmethod
    def open_binary(cls, name: str) -> BinaryIO:
        return cast(BinaryIO, io.BufferedReader(S3Object(name), _READ_AHEAD))

    @classmethod
    def find(cls, pattern: str) -> list[Stored]:
        from botocore.exceptions import BotoCoreError, ClientError

        url = urlparse(pattern)
        key = url.path.lstrip("/") + (f"?{url.query}" if url.query else "")  # `?` is a wildcard here, not a query
        literal = re.split(r"[*?\[]", key, maxsplit=1)[0]
        found = []
        try:
            for page in _pages(url.netloc, literal):
                for entry in page.get("Contents", ()):
                    name = entry["Key"]
                    below = name == key or name.startswith(key.rstrip("/") + "/") or not key
                    if below if literal == key else fnmatch.fnmatchcase(name, key):
                        found.append(Stored(f"s3://{url.netloc}/{name}", entry["Size"]))
        except (BotoCoreError, ClientError) as error:
            raise DataError(f"{pattern}: cannot be listed ({error})", remedy=ACCESS, id="not-listed") from error
        return sorted(found)

    @classmethod
    def upload(cls, local: Path, name: str) -> None:
        from boto3.exceptions import Boto3Error
        from boto3.s3.transfer import TransferConfig
        from botocore.exceptions import BotoCoreError, ClientError

        url = urlparse(name)
        config = TransferConfig(use_threads=False)  # prepare already runs one process per core
        try:
            retried(lambda: s3_client().upload_file(str(local), url.netloc, url.path.lstrip("/"), Config=config))
        except (Boto3Error, BotoCoreError, ClientError) as error:
            raise DatasetError(f"{name}: cannot be uploaded ({error})", remedy=ACCESS, id="not-uploaded") from error


@functools.cache
def s3_client() -> Any:
    """One client per process. Several threads may use it, but not a forked process."""
    import boto3
    from botocore.config import Config

    # `retried` repeats requests instead of botocore, which counts attempts: five that each meet silence take minutes
    retries = {"mode": "standard", "total_max_attempts": 1}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=config)


os.register_at_fork(after_in_child=s3_client.cache_clear)


def retried(request: Callable[[], Result]) -> Result:
    """request(), repeated with growing pauses after transient errors: no connection, silence, a busy server.

    Raises any other error at once, and a transient one TROUBLE_SECONDS after the first.
    """
    since: float | None = None
    pause = _FIRST_PAUSE
    while True:
        try:
            return request()
        except Exception as error:
            since = since or time.monotonic()
            if not _is_transient(error) or time.monotonic() - since + pause > TROUBLE_SECONDS:
                raise
        time.sleep(pause * random.uniform(0.5, 1))  # processes that failed together must not retry together
        pause = min(2 * pause, _LONGEST_PAUSE)


def _is_transient(error: BaseException) -> bool:
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import ClientError, HTTPClientError
    from urllib3.exceptions import HTTPError

    if isinstance(error, Boto3Error):  # an upload wraps the other errors in it
        return error.__context__ is not None and _is_transient(error.__context__)
    if isinstance(error, ClientError):
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status >= 500 or status in (408, 429)
    return isinstance(error, HTTPClientError | HTTPError | ConnectionError)


def _raising_os_error(request: Callable[[], Result]) -> Result:
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        return retried(request)
    except (BotoCoreError, ClientError, HTTPError) as error:  # what readers of files expect
        raise OSError(str(error)) from error


class S3Object(io.RawIOBase):
    """An S3 object, read through one connection. After a broken connection it continues at the same byte.

    Raises OSError when that fails, and for an object replaced while it is read.
    """

    def __init__(self, name: str):
        bucket = urlparse(name).netloc
        self._key = {"Bucket": bucket, "Key": name.removeprefix(f"s3://{bucket}/")}
        found = _raising_os_error(lambda: s3_client().head_object(**self._key))
        self._size, self._version, self._at = found["ContentLength"], found["ETag"], 0
        self._body: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base + offset != self._at:
            self._disconnect()
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        data = _raising_os_error(lambda: self._piece(wanted))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        self._disconnect()
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
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        body, self._body = getattr(self, "_body", None), None
        if body is not None:
            body.close()


def _pages(bucket: str, prefix: str) -> Iterator[dict]:
    further: dict | None = {}
    while further is not None:
        page = retried(functools.partial(s3_client().list_objects_v2, Bucket=bucket, Prefix=prefix, **further))
        yield page
        further = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else None
