"""A real S3 API on the loopback interface (moto's server), which a test can also make vanish, stall or damage."""

import logging
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.storage import shard_cache as cache
from ssa_pipelines.storage.stores.s3 import s3_client

BUCKET = "bucket"


class ObjectStore:
    """A server with one bucket. `url` is what S3_ENDPOINT_URL names."""

    def __init__(self, port: int = 0):
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for every request
        self.server = ThreadedMotoServer("127.0.0.1", port, verbose=False)
        self.server.start()
        self.port = self.server.get_host_and_port()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """After `stop`: the same server on the same port; moto keeps its objects in this process."""
        from moto.server import ThreadedMotoServer

        self.server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self.server.start()

    def stop(self) -> None:
        self.server.stop()

    def put(self, key: str, data: bytes) -> str:
        s3_client().put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        return s3_client().get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def keys(self, prefix: str = "") -> list[str]:
        return [stored.name.removeprefix(f"s3://{BUCKET}/") for stored in storage.find(f"s3://{BUCKET}/{prefix}")]

    def put_folder(self, folder: Path, prefix: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def credentials(url: str) -> Iterator[None]:
    """The environment in which boto3 and streaming use the server at `url`."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in access(url).items():
            patch.setenv(name, value)
        _forget_clients()
        yield
    _forget_clients()


def _forget_clients() -> None:
    s3_client.cache_clear()
    cache._downloader.cache_clear()


def access(url: str) -> dict[str, str]:
    """Environment variables with which a process uses the server at `url`."""
    keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
    return {"S3_ENDPOINT_URL": url, **keys, "NO_PROXY": "127.0.0.1", "AWS_EC2_METADATA_DISABLED": "true"}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    store = ObjectStore()
    try:
        with credentials(store.url):
            # moto keeps its objects as long as the process lives, those of an earlier test's store too
            urllib.request.urlopen(f"{store.url}/moto-api/reset", data=b"").close()
            s3_client().create_bucket(Bucket=BUCKET)
            yield store
    finally:
        store.stop()
