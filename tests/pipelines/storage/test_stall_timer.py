"""The stall timeout: what counts, what resets the clock, and that by default a fault is an error within 30 s."""

import hashlib
import time

import pytest

from ssa_pipelines import Access, DatasetError, ShardError
from ssa_pipelines.storage.shard_cache import Cache, Wanted, read_remote
from ssa_pipelines.storage.stall_timer import StallTimer
from ssa_pipelines.storage.stores import s3 as s3_store
from ssa_pipelines.stream.run_rows import RunRows
from tests.errors import raises
from tests.pipelines.object_store import BUCKET
from tests.pipelines.relay import relayed
from tests.pipelines.support import equal, stream, take

LIMIT = 30  # seconds until a fault is an error, with default settings
IN_ORDER = {"micro": 1, "batch": 1, "shuffle": False}


@pytest.fixture
def url(s3, prepared):
    return s3.put_folder(prepared, "data")


def error_after(rows, found: list) -> tuple[Exception, float]:
    """Adds the rows that still come to `found`; the error that ends them, and the seconds from the last row to it."""
    while True:
        began = time.monotonic()
        try:
            found.append(next(rows))
        except DatasetError as error:
            return error, time.monotonic() - began


@pytest.mark.slow  # 21 s each
@pytest.mark.parametrize("fault", ["silent", "gone"])
@pytest.mark.parametrize("read_ahead", [0, 2])
def test_by_default_a_store_that_stalls_or_vanishes_is_an_error_within_30_s(
    s3, url, prepared, tmp_path, fault, read_ahead
):
    with relayed(s3) as relay:
        rows = stream(url, access=Access(tmp_path / "cache"), read_ahead=read_ahead, **IN_ORDER)
        found = take(rows, 5)
        if fault == "silent":
            relay.silent = True
        else:
            relay.gone()
        error, seconds = error_after(rows, found)
    assert isinstance(error, ShardError)
    assert error.id == "object-stalled"
    assert "20 s" in error.problem
    assert 10 < seconds < LIMIT
    assert error.shard.startswith(f"{url}/train/shard.")
    assert "S3_ENDPOINT_URL" in error.remedy
    assert equal(found, take(stream(prepared, **IN_ORDER), len(found)))


@pytest.mark.slow  # 20 s
def test_by_default_a_silent_store_when_training_starts_is_an_error_within_30_s(s3, url, tmp_path):
    with relayed(s3) as relay:
        relay.silent = True
        began = time.monotonic()
        with raises(ShardError, "object-stalled", "data/dataset.json", "20 s"):
            stream(url, access=Access(tmp_path / "cache"))
        assert time.monotonic() - began < LIMIT


@pytest.mark.slow  # 25 s
def test_by_default_a_read_of_a_dead_file_system_is_an_error_within_30_s(prepared, monkeypatch):
    rows = stream(prepared, **IN_ORDER)
    take(rows, 5)
    monkeypatch.setattr("ssa_pipelines.shards.row_reader.from_sample", lambda *_, **__: time.sleep(60))
    began = time.monotonic()
    with raises(DatasetError, "read-stalled", "25 s", ".mds"):
        take(rows, 5)
    assert time.monotonic() - began < LIMIT


def stream_with(timeout: float, url, tmp_path, **options):
    """A stream whose first row was read without a limit, as a busy machine needs, and which has this stall timeout then."""
    rows = stream(url, access=Access(tmp_path / "cache", stall_timeout=60), **{**IN_ORDER, **options})
    rows._fetchers.close(5)  # so that a shard is first wanted by a row that is read
    first = take(rows, 1)
    rows._stall_timer.seconds = timeout
    return rows, first


def test_a_fault_while_training_is_not_blocked_is_retried(s3, url, prepared, tmp_path):
    ahead, timeout = 4, 1.5
    with relayed(s3) as relay:
        rows, found = stream_with(timeout, url, tmp_path, read_ahead=ahead)
        count = int(rows.rows.readers[0].rows_per_shard[0]) - ahead + 1
        found += take(rows, count - 2)
        relay.gone()
        found += take(rows, 1)  # ahead of which a row of the second shard is being read
        time.sleep(2 * timeout)
        relay.back()
        found += take(rows, rows.rows_per_epoch - count)
    assert equal(found, take(stream(prepared, **IN_ORDER), len(found)))


def test_rows_fetched_ahead_are_delivered_before_the_error(s3, url, prepared, tmp_path):
    with relayed(s3) as relay:
        rows, found = stream_with(1.5, url, tmp_path)
        count = int(rows.rows.readers[0].rows_per_shard[0])
        relay.gone()
        found += take(rows, count - 1)
        began = time.monotonic()
        with raises(ShardError, "object-stalled", "1.5 s"):
            next(rows)
        assert time.monotonic() - began < 5
        relay.back()
        rows._stall_timer.seconds = 60
        found += take(rows, 3)  # the next call continues at the same row
    assert equal(found, take(stream(prepared, **IN_ORDER), count + 3))


def test_a_slow_object_may_take_longer_than_the_stall_timeout(s3):
    data = bytes(range(256)) * 8192  # 2 MiB, of which streaming's downloader writes 256 KiB at a time
    url = s3.put("large", data)
    with relayed(s3) as relay:
        assert read_remote(s3.put("small", b"x"), Access(stall_timeout=60)) == b"x"  # makes the client
        relay.rate = 500_000
        began = time.monotonic()
        assert read_remote(url, Access(stall_timeout=3)) == data
        assert time.monotonic() - began > 3


def test_an_object_that_never_gets_past_its_beginning_is_an_error(s3):
    url = s3.put("large", bytes(2 << 20))
    with relayed(s3) as relay:
        assert read_remote(s3.put("small", b"x"), Access(stall_timeout=60)) == b"x"  # makes the client
        relay.first = 700_000
        began = time.monotonic()
        with raises(ShardError, "object-stalled", "3 s"):
            read_remote(url, Access(stall_timeout=3))
        assert time.monotonic() - began < 8


def test_a_closed_stream_stops_requests_to_a_store_that_is_gone(s3, url, tmp_path):
    with relayed(s3) as relay:
        rows = stream(url, access=Access(tmp_path / "cache", stall_timeout=60), read_ahead=4, **IN_ORDER)
        take(rows, 1)
        rows._stall_timer.seconds = 1
        relay.gone()
        take(rows, int(rows.rows.readers[0].rows_per_shard[0]) - 4)  # the next shard is being read ahead, or fetched
        threads = [*rows._thread._threads, *rows._fetchers._threads]
        assert rows.rows.readers[0]._fetching
        rows.close()
        for thread in threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in threads)


def test_computing_an_order_may_take_longer_than_the_stall_timeout(prepared, monkeypatch):
    monkeypatch.setattr("ssa_pipelines.stream.train_stream._GRACE", 0.3)
    rows = stream(prepared, access=Access(stall_timeout=0.3), read_ahead=0, **IN_ORDER)
    locate = RunRows._locate

    def slowly(self, *where):  # the order of an epoch of a billion rows
        time.sleep(2.5)
        return locate(self, *where)

    monkeypatch.setattr(RunRows, "_locate", slowly)
    assert equal(take(rows, 1), take(stream(prepared, **IN_ORDER), 1))


def test_after_a_long_damaged_transfer_the_second_one_has_the_whole_stall_timeout(tmp_path, monkeypatch):
    data, begun = b"as it is", []

    def download(url, target, stall_timer, since):
        begun.append((since, time.monotonic()))
        time.sleep(0.2)
        target.write_bytes(data if len(begun) == 2 else b"as it is not")

    monkeypatch.setattr("ssa_pipelines.storage.shard_cache._download", download)
    cache = Cache("s3://bucket/data", tmp_path, Access(stall_timeout=20))
    wanted = Wanted("train/index.json", len(data), hashlib.sha256(data).hexdigest())
    assert cache.fetch(wanted).read_bytes() == data
    assert begun[1][0] >= begun[0][1] + 0.2


def test_a_missing_object_is_an_error_at_once(s3):
    began = time.monotonic()
    with raises(ShardError, "object-missing", f"s3://{BUCKET}/absent"):
        read_remote(f"s3://{BUCKET}/absent", Access())
    assert time.monotonic() - began < 5


def test_a_job_does_not_wait_for_ever_for_the_fetch_of_another_job_on_the_machine(s3, url, tmp_path, prepared):
    with relayed(s3) as relay:
        (patient, _), (hasty, _) = (stream_with(timeout, url, tmp_path) for timeout in (60, 1.5))
        relay.silent = True
        patient._thread.submit(patient.rows.readers[0].prefetch, 1)  # holds the lock of the second shard
        time.sleep(0.5)
        count = int(hasty.rows.readers[0].rows_per_shard[0])
        take(hasty, count - 1)
        began = time.monotonic()
        with raises(ShardError, "shard-locked", "1.5 s"):
            next(hasty)
        assert time.monotonic() - began < 5


def test_the_clock_runs_only_while_the_consumer_is_blocked(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("ssa_pipelines.storage.stall_timer.time.monotonic", lambda: now[0])
    clock = StallTimer(20)
    assert clock.left(95) == 15  # outside of a stream the caller waits
    with clock.waiting():
        now[0] = 110
        assert clock.left(95) == 10  # from the moment that somebody waits
        assert clock.left(108) == 18  # or from the trouble's beginning
    assert clock.left(95) == float("inf")


def test_no_wait_in_a_store_client_is_longer_than_the_errors_limit():
    client = s3_store.s3_client().meta.config
    assert max(client.connect_timeout, client.read_timeout) + s3_store.TROUBLE_SECONDS + client.read_timeout < LIMIT
