"""An object store that is slow, silent, broken off or replaced under the reader: the bytes of the object, or an error in time."""

import random
import time

import pytest
from typer.testing import CliRunner

from ssa_megatron import cli
from ssa_pipelines import CorpusError, DatasetError, iter_documents
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.storage.stores import s3 as s3_store
from tests.pipelines.object_store import BUCKET
from tests.pipelines.relay import relayed

LIMIT = 30  # seconds until a fault is an error, with default settings


@pytest.fixture
def data(s3) -> bytes:
    """3 MB in an object, several times what is asked of the socket at once."""
    content = random.Random(3).randbytes(3_000_017)
    s3.put("object", content)
    return content


@pytest.fixture
def brief(monkeypatch):
    """Short timeouts."""
    monkeypatch.setattr(s3_store, "READ_SECONDS", 0.5)
    monkeypatch.setattr(s3_store, "TROUBLE_SECONDS", 2.0)


def test_an_object_reads_and_seeks_like_the_file_it_was(data):
    with storage.open_binary(f"s3://{BUCKET}/object") as file:
        assert file.seekable()
        for at, count in ((0, 10), (2_999_990, 100), (5, 1), (1_500_000, 1_200_001), (3_000_017, 1), (4_000_000, 1)):
            assert file.seek(at) == at
            assert file.read(count) == data[at : at + count]
        assert file.seek(-7, 2) == 3_000_010
        assert file.read() == data[-7:]
        file.seek(0)
        assert file.read() == data


def test_an_empty_object_reads_as_empty(s3):
    s3.put("empty", b"")
    with storage.open_binary(f"s3://{BUCKET}/empty") as file:
        assert file.read() == b""


def test_a_broken_connection_continues_at_the_same_byte(s3, data, brief):
    with relayed(s3) as relay, storage.open_binary(f"s3://{BUCKET}/object") as file:
        relay.first = 1_700_000  # of each connection: what it still holds is lost, and the next one goes on
        assert file.read() == data


def test_an_object_replaced_while_it_is_read_is_an_error(s3, data):
    with storage.open_binary(f"s3://{BUCKET}/object") as file:
        file.read(100)
        s3.put("object", bytes(len(data)))
        file.seek(2_000_000)  # so that it must ask anew
        with pytest.raises(OSError, match="PreconditionFailed"):
            file.read(1)


def test_an_object_that_is_missing_or_forbidden_is_an_error_at_once(s3):
    began = time.monotonic()
    with pytest.raises(OSError, match="404"):
        storage.open_binary(f"s3://{BUCKET}/absent")
    assert time.monotonic() - began < 3


def test_requests_to_a_store_that_is_gone_for_a_moment_are_retried(s3, brief, tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    with relayed(s3) as relay:
        for ask in (
            lambda: storage.upload(tmp_path / "file", f"s3://{BUCKET}/file"),
            lambda: storage.find(f"s3://{BUCKET}/file"),
            lambda: storage.open_binary(f"s3://{BUCKET}/file").read(),
        ):
            relay.silent = True
            began = time.monotonic()
            again = lambda: setattr(relay, "silent", False)  # noqa: E731
            timer = _later(1.0, again)
            ask()
            assert time.monotonic() - began > 0.5
            timer.join()


def _later(seconds: float, call):
    import threading

    timer = threading.Timer(seconds, call)
    timer.start()
    return timer


def test_many_objects_are_listed_page_by_page(s3, monkeypatch):
    for number in range(7):
        s3.put(f"many/{number}", b"x")
    client = s3_store.s3_client()
    real, pages = client.list_objects_v2, []

    def short(**options):
        pages.append(options)
        return real(**options, MaxKeys=3)

    monkeypatch.setattr(client, "list_objects_v2", short)
    assert [stored.name[-1] for stored in storage.find(f"s3://{BUCKET}/many/")] == list("0123456")
    assert len(pages) == 3


@pytest.mark.slow  # 22 s each
@pytest.mark.parametrize("verb", ["prepare", "tokenizer", "upload", "read"])
def test_by_default_a_silent_store_is_an_error_within_30_s(s3, tmp_path, tokenizer, verb):
    (tmp_path / "file").write_bytes(b"abc")
    s3.put("text/a.jsonl", b'{"text": "one"}\n' * 2_000_000)
    source, out = f"s3://{BUCKET}/text", str(tmp_path / "out")
    prepare = ["data", "prepare", source, "--tokenizer", str(tokenizer.path), "--out", out, "--row-length", "9"]
    train = ["tokenizer", "train", source, "--out", out, "--vocab-size", "300"]
    documents = iter_documents(source)
    calls = {
        "prepare": lambda: CliRunner().invoke(cli.app, prepare, catch_exceptions=False),
        "tokenizer": lambda: CliRunner().invoke(cli.app, train, catch_exceptions=False),
        "upload": lambda: storage.upload(tmp_path / "file", f"s3://{BUCKET}/file"),
        "read": lambda: list(documents),
    }
    with relayed(s3) as relay:
        next(documents)
        relay.silent = True
        began = time.monotonic()
        with pytest.raises((CorpusError, DatasetError)) as caught:
            calls[verb]()
        seconds = time.monotonic() - began
    assert seconds < LIMIT, seconds
    assert f"s3://{BUCKET}/" in caught.value.problem
    assert "S3_ENDPOINT_URL" in caught.value.remedy
