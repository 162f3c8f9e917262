"""Files here and in object stores, under one way of naming them: a path, or a URL such as `s3://bucket/key`.

Listing, sizes and uploads go through boto3, streamed reads through smart_open, and shard downloads through streaming's
own downloaders (see cache.py). `S3_ENDPOINT_URL` names a server other than Amazon's, as it does for streaming. It
refuses schemes that it cannot list and names every object it could not reach.
"""

import fnmatch
import functools
import os
import re
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import urlparse

from pipelines.errors import DataError, DatasetError

CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 10, 60, 5


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

    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    config = Config(connect_timeout=CONNECT_SECONDS, read_timeout=READ_SECONDS, retries=retries)
    return boto3.client("s3", endpoint_url=os.environ.get("S3_ENDPOINT_URL"), config=config)


os.register_at_fork(after_in_child=s3_client.cache_clear)


def open_binary(name: str | Path) -> BinaryIO:
    """Opens a file or an S3 object for reading; both can seek, and an object is read in pieces as asked for."""
    if not is_remote(name):
        return open(name, "rb")
    import smart_open

    return smart_open.open(
        str(name), "rb", compression="disable", transport_params={"client": s3_client(), "defer_seek": True}
    )


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
        for page in s3_client().get_paginator("list_objects_v2").paginate(Bucket=url.netloc, Prefix=literal):
            for entry in page.get("Contents", ()):
                name = entry["Key"]
                below = name == key or name.startswith(key.rstrip("/") + "/") or not key
                if below if literal == key else fnmatch.fnmatchcase(name, key):
                    found.append(Stored(f"s3://{url.netloc}/{name}", entry["Size"]))
    except (BotoCoreError, ClientError) as error:
        raise DataError(f"{pattern}: cannot be listed ({error})", remedy=_ACCESS) from error
    return sorted(found)


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
        s3_client().upload_file(str(local), url.netloc, url.path.lstrip("/"), Config=TransferConfig(use_threads=False))
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise DatasetError(f"{name}: cannot be uploaded ({error})", remedy=_ACCESS) from error


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


_ACCESS = "check S3_ENDPOINT_URL, the credentials, the bucket and the network, then try again"
