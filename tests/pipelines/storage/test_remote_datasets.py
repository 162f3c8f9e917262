"""Datasets in an object store: the same rows as from a folder, a cache that many share, and remote verification."""

import contextlib
import os
import threading

import pytest

import ssa_pipelines
from ssa_pipelines import Access, DatasetError, ShardError
from tests.errors import raises
from tests.pipelines.support import contents, equal, flip_bit, stream, take


@pytest.fixture
def remote(s3, prepared):
    return s3.put_folder(prepared, "data")


@pytest.fixture
def remote_compressed(s3, compressed):
    return s3.put_folder(compressed, "compressed")


def access(tmp_path, **options) -> Access:
    return Access(cache=tmp_path / "cache", **{"stall_timeout": 60, **options})


def cached(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").glob("*/train/*"))


@pytest.mark.parametrize("which", ["remote", "remote_compressed"])
@pytest.mark.parametrize("read_ahead", [0, 2])
def test_remote_rows_equal_those_of_the_folder_and_are_cached(which, read_ahead, request, tmp_path, prepared, s3):
    url, count = request.getfixturevalue(which), 200
    rows = stream(url, access=access(tmp_path), read_ahead=read_ahead)
    assert equal(take(rows, count), take(stream(prepared), count))
    rows.close()
    assert all(name.endswith((".mds", "index.json")) for name in cached(tmp_path))  # unpacked, and no litter


def test_the_first_rows_do_not_wait_for_the_whole_dataset(remote, tmp_path, prepared):
    rows = stream(remote, access=access(tmp_path), shuffle=False, micro=1, batch=1, read_ahead=0)
    rows._fetchers.close(5)  # so that nothing is fetched ahead
    take(rows, 3)
    assert cached(tmp_path) == ["index.json", "shard.00000.00000.mds"]


def test_readers_of_two_ranks_share_a_cache(remote, tmp_path, prepared, s3):
    found: dict[int, list] = {}

    def read(rank: int) -> None:
        found[rank] = take(stream(remote, rank=rank, size=2, access=access(tmp_path)), 60)

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    together = [rows for pair in zip(found[0], found[1], strict=True) for rows in pair]
    assert equal(together, take(stream(prepared), 120))


def test_a_cache_stays_under_its_limit_and_the_rows_stay_right(remote, tmp_path, prepared):
    info = ssa_pipelines.load_dataset_info(prepared)
    sizes = [file.bytes for name, file in info.splits["train"].files.items() if name.endswith(".mds")]
    limit = sum(sizes) // 2
    options = {"shuffle": False, "micro": 1, "batch": 1}
    rows = stream(remote, access=access(tmp_path, cache_limit=limit), shuffle_block=1, **options)
    local = stream(prepared, **options)
    largest = 0
    for _ in range(2 * rows.rows_per_epoch):
        assert equal([next(rows)], [next(local)])
        largest = max(largest, size_of(tmp_path / "cache"))
    assert limit // 3 < largest <= limit + 4 * max(sizes)  # four threads fetch


def size_of(cache) -> int:
    """Bytes of the shards in a cache that other threads add to and remove from."""
    total = 0
    for path in cache.glob("*/train/*.mds"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def test_a_cache_too_small_for_the_shuffle_is_refused_with_what_it_needs(remote, tmp_path):
    with raises(DatasetError, "cache-limit-below-shuffle", "90,000", remote):
        stream(remote, access=access(tmp_path, cache_limit=90_000))


def test_a_cached_shard_that_the_disk_altered_is_fetched_again(remote, tmp_path, prepared):
    take(stream(remote, access=access(tmp_path)), 200)
    for path in (tmp_path / "cache").glob("*/train/*.mds"):
        flip_bit(path, path.stat().st_size // 2)
    count = 300
    assert equal(take(stream(remote, access=access(tmp_path)), count), take(stream(prepared), count))


@pytest.mark.parametrize("name", ["train/index.json", "tokenizer.model", "records.json"])
def test_a_cached_index_or_tokenizer_that_the_disk_altered_is_fetched_again(remote, tmp_path, prepared, name):
    take(stream(remote, access=access(tmp_path)), 1)
    (path,) = (tmp_path / "cache").glob(f"*/{name}")
    flip_bit(path, path.stat().st_size // 2)
    assert equal(take(stream(remote, access=access(tmp_path)), 20), take(stream(prepared), 20))
    assert path.read_bytes() == (prepared / name).read_bytes()


def test_only_partial_files_of_a_killed_process_are_removed(remote, tmp_path, prepared):
    info = ssa_pipelines.load_dataset_info(remote, access(tmp_path))
    ours = info.path / ".parts" / "train-shard.00000.00000.mds.0123.part.1.abcd"
    foreign = [info.path / "train" / "notes.txt", tmp_path / "cache" / "another-job" / "file.part"]
    for path in (ours, *foreign):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    rows = stream(remote, access=access(tmp_path))
    assert equal(take(rows, 200), take(stream(prepared), 200))
    assert not ours.exists()
    assert all(path.exists() for path in foreign)


def test_remote_verification_reads_everything_and_keeps_nothing(s3, remote, prepared, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert ssa_pipelines.verify(remote)["splits"] == ssa_pipelines.verify(prepared)["splits"]
    assert not (tmp_path / "home").exists()
    shard = sorted(name for name in contents(prepared) if name.endswith(".mds"))[-1]
    data = bytearray(s3.get(f"data/{shard}"))
    data[-1] ^= 1
    s3.put(f"data/{shard}", bytes(data))
    with raises(ShardError, "shard-altered") as caught:
        ssa_pipelines.verify(remote)
    assert caught.value.shard == f"{remote}/{shard}"


def test_stats_decode_a_sample(remote, tmp_path, prepared, documents, tokenizer):
    report = ssa_pipelines.stats(remote, access=access(tmp_path))
    for name, split in report["splits"].items():
        assert split["sample"][:40] in "".join(documents), name
        assert sum(split["lengths"].values()) == split["documents"]
        assert 0 <= split["padding_share"] < 0.5
    del report["path"]
    assert report == {k: v for k, v in ssa_pipelines.stats(prepared).items() if k != "path"}


def test_a_dataset_prepared_to_a_store_is_read_from_it(s3, tmp_path, documents, tokenizer, prepared):
    from tests.pipelines.support import SETTINGS

    ssa_pipelines.prepare(iter(documents), tokenizer, "s3://bucket/new", scratch=tmp_path / "scratch", **SETTINGS)
    rows = stream("s3://bucket/new", access=access(tmp_path))
    assert equal(take(rows, 100), take(stream(prepared), 100))
    assert os.listdir(tmp_path) == ["cache"]
