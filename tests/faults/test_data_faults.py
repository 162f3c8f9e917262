"""Data that breaks under way: an error that names the shard, in time, with every row before it delivered exactly once."""

import errno
import json
import os
import resource
import shutil
import socket
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from ssa_pipelines import Access, DatasetError, ShardError, evaluation_rows
from ssa_pipelines.shards.row_reader import RowReader
from ssa_pipelines.storage.stores.s3 import s3_client
from tests import launch
from tests.errors import raises
from tests.pipelines.conftest import documents, prepared, s3, tokenizer  # noqa: F401 (fixtures)
from tests.pipelines.object_store import BUCKET, credentials
from tests.pipelines.support import equal, stream, take
from tests.ssa_megatron.conftest import corpus, dataset  # noqa: F401 (fixtures)

SHORT = 3  # seconds, where trouble is to last longer
LONG = 60  # seconds, where the fault shows at once; a busy machine may be slow to make a connection
LIMIT = 30  # seconds until every fault is an error


@pytest.fixture
def remote(s3, prepared):  # noqa: F811
    return s3.put_folder(prepared, "data")


def rows_until_error(url, tmp_path, **options) -> tuple[list, Exception, float]:
    """The micro-batches before the error, the error, and the seconds from the last row to it."""
    rows = stream(
        url, micro=1, batch=1, shuffle=False, access=Access(tmp_path / "cache", stall_timeout=LONG), **options
    )
    found, last = [], time.monotonic()
    try:
        for _ in range(rows.rows_per_epoch):
            found.append(next(rows))
            last = time.monotonic()
    except DatasetError as error:
        return found, error, time.monotonic() - last
    raise AssertionError("the whole epoch was read")


def damaged(data: bytes, how: str) -> bytes:
    return {"truncated": data[:-100], "flipped": data[:2000] + bytes([data[2000] ^ 4]) + data[2001:]}[how]


SHARD = "train/shard.00001.00000.mds"
FAULTS = {
    "missing": "object-missing",
    "truncated": "shard-truncated",
    "flipped": "shard-altered",
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("read_ahead", [0, 2])
def test_a_broken_remote_shard_is_named_after_every_row_before_it(s3, remote, prepared, tmp_path, fault, read_ahead):  # noqa: F811
    if fault == "missing":
        s3_client().delete_object(Bucket=BUCKET, Key=f"data/{SHARD}")
    else:
        s3.put(f"data/{SHARD}", damaged(s3.get(f"data/{SHARD}"), fault))
    found, error, seconds = rows_until_error(remote, tmp_path, read_ahead=read_ahead)
    assert isinstance(error, ShardError)
    assert error.shard == f"{remote}/{SHARD}"
    assert error.id == FAULTS[fault]
    assert seconds < LIMIT
    assert found
    assert equal(found, take(stream(prepared, micro=1, batch=1, shuffle=False), len(found)))


def test_a_store_that_vanishes_and_returns_in_time_costs_no_row(s3, remote, prepared, tmp_path):  # noqa: F811
    rows = stream(
        remote, access=Access(tmp_path / "cache", stall_timeout=30), micro=1, batch=1, shuffle=False, read_ahead=0
    )
    rows._fetchers.close(5)  # nothing ahead of need, so that the gap is felt
    found = take(rows, 3)
    calls = []
    s3.stop()
    back = threading.Timer(1.0, lambda: calls.append(s3.start()))
    back.start()
    try:
        found += take(rows, rows.rows_per_epoch - 3)
    finally:
        back.join()
    assert calls
    assert equal(found, take(stream(prepared, micro=1, batch=1, shuffle=False), len(found)))


def test_a_store_that_was_away_while_shards_were_fetched_ahead_and_is_back_when_they_are_read_costs_no_row(
    s3,  # noqa: F811
    remote,
    prepared,  # noqa: F811
    tmp_path,
):
    rows = stream(remote, access=Access(tmp_path / "cache", stall_timeout=SHORT), micro=1, batch=1, shuffle=False)
    s3.stop()
    rows.rows.readers[0].prefetch(1)  # what a fetching thread does, long before the row is due
    s3.start()
    found = take(rows, rows.rows_per_epoch)
    assert equal(found, take(stream(prepared, micro=1, batch=1, shuffle=False), len(found)))


def test_a_store_that_vanishes_for_good_is_an_error_that_names_the_shard(s3, remote, tmp_path):  # noqa: F811
    rows = stream(
        remote, access=Access(tmp_path / "cache", stall_timeout=LONG), micro=1, batch=1, shuffle=False, read_ahead=0
    )
    next(rows)
    rows._stall_timer.seconds = SHORT
    s3.stop()
    began = time.monotonic()
    with raises(ShardError, "object-stalled", f"{SHORT} s") as caught:
        take(rows, rows.rows_per_epoch)
    assert time.monotonic() - began < LIMIT
    assert caught.value.shard.startswith(f"{remote}/train/shard.")


@contextmanager
def silent_server():
    """Takes every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_server_that_says_nothing_is_an_error_and_not_a_hang(tmp_path):
    with silent_server() as url, credentials(url):
        began = time.monotonic()
        with raises(ShardError, "object-stalled", "s3://bucket/data/dataset.json", "3 s"):
            stream("s3://bucket/data", access=Access(tmp_path / "cache", stall_timeout=SHORT))
        assert time.monotonic() - began < LIMIT


def test_a_read_that_never_ends_is_an_error_and_not_a_hang(prepared, monkeypatch):  # noqa: F811
    monkeypatch.setattr("ssa_pipelines.stream.train_stream._GRACE", 0.5)
    rows = stream(prepared, access=Access(stall_timeout=0.5))
    take(rows, 5)
    never = threading.Event()
    monkeypatch.setattr(RowReader, "_read", lambda *_: never.wait(60))  # a dead file system
    began = time.monotonic()
    with raises(DatasetError, "read-stalled", "1 s", ".mds"):
        take(rows, 5)
    assert time.monotonic() - began < 5
    never.set()


def test_an_evaluation_whose_read_never_ends_is_an_error_and_not_a_hang(prepared, monkeypatch):  # noqa: F811
    layout = {"micro_batch_rows": 1, "data_parallel_rank": 0, "data_parallel_size": 1}
    rows = evaluation_rows(prepared, rows=3, access=Access(stall_timeout=0.5), **layout)
    monkeypatch.setattr("ssa_pipelines.stream.train_stream._GRACE", 0.5)
    never, read = threading.Event(), RowReader._read

    def hang(reader, shard, index):
        return read(reader, shard, index) if (shard, index) < (0, 2) else never.wait(60)  # a dead file system

    monkeypatch.setattr(RowReader, "_read", hang)
    began = time.monotonic()
    assert [len(next(rows).tokens) for _ in range(2)] == [1, 1]
    with raises(DatasetError, "read-stalled", "1 s", "validation/", ".mds"):
        next(rows)
    assert time.monotonic() - began < 5
    never.set()


@contextmanager
def nothing_more_fits(folder: Path):
    """Yields the error number that the next shard written to `folder` meets: on a disk of 300 kB with 50 left, or, for a user
    who may not mount one, at a limit on the size of files."""
    with open(folder / "foreign", "wb") as foreign:
        os.posix_fallocate(foreign.fileno(), 0, 250_000)
    if os.path.ismount(folder):
        yield errno.ENOSPC
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        yield errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_cache_disk_is_named_with_what_was_to_go_there(s3, remote, tmp_path):  # noqa: F811
    small = tmp_path / "small"
    small.mkdir()
    os.system(f"mount -t tmpfs -o size=300k tmpfs {small} 2> {tmp_path / 'refused'}")
    try:
        rows = stream(remote, access=Access(small, stall_timeout=LONG), micro=1, batch=1, shuffle=False, read_ahead=0)
        with (
            nothing_more_fits(small) as number,
            raises(DatasetError, "cache-not-written", os.strerror(number), "data.cache"),
        ):
            take(rows, rows.rows_per_epoch)
        assert (small / "foreign").stat().st_size == 250_000  # another's file is not ours to remove
    finally:
        if os.path.ismount(small):
            os.system(f"umount -l {small}")


def test_training_ends_with_the_data_exit_code_and_the_shards_name(s3, dataset, tmp_path):  # noqa: F811
    """Through the command line, each fault in a process of its own."""
    from ssa_megatron.config import dump_recipe
    from tests.ssa_megatron.support import tiny

    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_recipe(tiny(model__vocab_size=704, logging__tensorboard=False)))
    shard = max((dataset / "train").glob("*.mds"), key=lambda path: path.stat().st_size).name
    urls = {fault: s3.put_folder(dataset, fault) for fault in ("sound", *FAULTS)}
    for fault in FAULTS:
        key = f"{fault}/train/{shard}"
        if fault == "missing":
            s3_client().delete_object(Bucket=BUCKET, Key=key)
        else:
            s3.put(key, damaged(s3.get(key), fault))
    with silent_server() as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}"
        closed.close()

        def train(name: str, url: str, *environment: str, stall_timeout: int = LONG) -> list[str]:
            data = [f"data.path={url}", f"data.cache={tmp_path / name}", f"data.stall_timeout={stall_timeout}"]
            return [
                *environment,
                "train",
                str(recipe),
                *data,
                "train.steps=60",
                "--run-folder",
                str(tmp_path / f"run-{name}"),
            ]

        cases = {name: train(name, url) for name, url in urls.items()}
        cases["silent"] = train("silent", urls["sound"], f"S3_ENDPOINT_URL={silent}", stall_timeout=SHORT)
        cases["gone"] = train("gone", urls["sound"], f"S3_ENDPOINT_URL={gone}", stall_timeout=SHORT)
        (tmp_path / "cases.json").write_text(json.dumps(list(cases.values())))
        launch.run(
            1, "tests.workers.command_lines", str(tmp_path / "cases.json"), str(tmp_path / "out.json"), timeout=280
        )
    results = dict(zip(cases, json.loads((tmp_path / "out.json").read_text()), strict=True))
    assert results.pop("sound")["code"] == 0
    for name, result in results.items():
        assert result["code"] == 3, (name, result["output"][-2000:])
        assert result["seconds"] < LIMIT, name
        expected = f"{urls[name]}/train/{shard}" if name in FAULTS else f"{urls['sound']}/dataset.json"
        id = FAULTS.get(name, "object-stalled")
        assert f"error[{id}]: shard {expected}: " in result["output"], (name, result["output"][-2000:])
        assert "Traceback" not in result["output"], name


def test_shared_memory_and_files_of_a_neighbour_are_not_touched(s3, remote, tmp_path, prepared):  # noqa: F811
    """What mosaicml-streaming leaves in /dev/shm after a kill blocks its next job; here it is neither used nor removed."""
    stale = [f"/dev/shm/00000{n}_locals" for n in range(2)]
    made = [path for path in stale if not os.path.exists(path)]
    try:
        for path in made:
            with open(path, "wb") as file:
                file.write(b"stale")
        neighbour = stream(remote, access=Access(tmp_path / "cache", stall_timeout=LONG))
        rows = stream(remote, access=Access(tmp_path / "cache", stall_timeout=LONG))
        for _ in range(50):  # two jobs on one node, one cache
            assert equal([next(rows)], [next(neighbour)])
        assert all(os.path.exists(path) for path in made)
    finally:
        for path in made:
            os.unlink(path)
    maps = Path("/proc/self/maps").read_text()
    assert not [path for path in stale if path in maps]


def test_a_local_dataset_removed_while_it_is_read_is_an_error(prepared, tmp_path):  # noqa: F811
    data = shutil.copytree(prepared, tmp_path / "data")
    rows = stream(data, micro=1, batch=1)
    found = take(rows, 5)
    shutil.rmtree(data / "train")
    with raises(ShardError, "row-unreadable"):
        take(rows, rows.rows_per_epoch)
    assert equal(found, take(stream(prepared, micro=1, batch=1), 5))
