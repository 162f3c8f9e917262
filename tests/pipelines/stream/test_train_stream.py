"""Every rank, layout, interruption and damage: the right rows in the right order, or an error that names the shard."""

import collections
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import ssa_pipelines
from ssa_pipelines import DatasetError, DatasetMismatch, ShardError
from ssa_pipelines.stream.row_order import epoch_order
from tests.errors import raises
from tests.launch import environment
from tests.pipelines.support import ROW_LENGTH, equal, flip_bit, stream, take, truncate


def row_keys(micro_batches):
    return [row.numpy().tobytes() for rows in micro_batches for row in rows.tokens]


def test_a_micro_batch_has_the_promised_shape_and_type(prepared):
    rows = next(stream(prepared, micro=3))
    assert rows.tokens.shape == rows.doc_starts.shape == (3, ROW_LENGTH)
    assert (rows.tokens.dtype, rows.doc_starts.dtype) == (torch.int64, torch.int32)
    assert bool((rows.doc_starts <= torch.arange(ROW_LENGTH)).all())


def test_each_epoch_holds_every_row_once_and_in_another_order(prepared):
    rows = stream(prepared, micro=1, batch=1)
    stored = row_keys(take(stream(prepared, micro=1, batch=1, shuffle=False), rows.rows_per_epoch))
    epochs = [row_keys(take(rows, rows.rows_per_epoch)) for _ in range(3)]
    for epoch in epochs:
        assert collections.Counter(epoch) == collections.Counter(stored)
    for one, other in itertools.combinations([*epochs, stored], 2):
        assert one != other
    assert rows.epochs == {"": 3.0}


def test_the_seed_decides_the_order(prepared):
    a, b, c = (row_keys(take(stream(prepared, seed=seed), 20)) for seed in (3, 3, 4))
    assert a == b
    assert a != c


@pytest.mark.parametrize("shards", [[1], [7], [5, 1, 9], [100] * 30, [300_000]])
def test_an_epochs_order_is_a_permutation_whatever_the_shards(shards):
    shards = np.array(shards, np.int64)
    orders = [epoch_order(shards, seed=1, epoch=epoch, shuffle=True) for epoch in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(shards.sum()))
    assert shards.sum() < 8 or orders[0].tolist() != orders[1].tolist()
    assert epoch_order(shards, seed=1, epoch=1, shuffle=False).tolist() == list(range(shards.sum()))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_rows_of_a_step_and_of_each_micro_batch_do_not_depend_on_the_data_parallel_size(prepared, size):
    alone = take(stream(prepared, micro=2, batch=12), 6 * 150)  # beyond an epoch's end
    ranks = [take(stream(prepared, micro=2, batch=12, rank=rank, size=size), 6 * 150 // size) for rank in range(size)]
    together = [rows for micro_batch in zip(*ranks, strict=True) for rows in micro_batch]
    assert equal(together, alone)


@pytest.mark.parametrize("micro", [1, 4])
def test_another_micro_batch_size_keeps_the_sequence_of_rows(prepared, micro):
    assert row_keys(take(stream(prepared, micro=micro), 24 // micro)) == row_keys(take(stream(prepared, micro=2), 12))


def test_the_order_is_the_same_as_in_earlier_releases():
    """Pinned: runs in progress depend on it, and refuse to resume after an upgrade of streaming or numpy changed it."""
    shards = np.array([40, 3, 17], np.int64)
    orders = [epoch_order(shards, seed=1, epoch=epoch, shuffle=True) for epoch in range(3)]
    digest = hashlib.sha256(np.concatenate(orders).astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "e128f17b32e43875"


def positions(path) -> list[int]:
    """Micro-batches of 2 rows: the first ones, an odd one, and those around the ends of two epochs."""
    epoch = ssa_pipelines.load_dataset_info(path).splits["train"].rows / 2
    return [0, 1, 7] + [int(epoch * n) + d for n in (1, 2) for d in (-1, 0, 1)]


@pytest.mark.parametrize("read_ahead", [0, 2])
def test_resuming_gives_exactly_the_rows_of_an_uninterrupted_run(prepared, read_ahead):
    full = take(stream(prepared), max(positions(prepared)) + 9)
    first, second = stream(prepared, read_ahead=read_ahead), stream(prepared, read_ahead=read_ahead)
    reached = 0
    for position in positions(prepared):
        assert equal(take(first, position - reached), full[reached:position])
        reached = position
        state = json.loads(json.dumps(first.state_dict()))
        assert state["samples_seen"] == 2 * position
        second.load_state_dict(state)  # wherever it was before
        assert equal(take(second, 9), full[position : position + 9])


def test_resuming_at_another_data_parallel_size_continues_the_sequence(prepared):
    full = take(stream(prepared), 90)
    two = [stream(prepared, rank=rank, size=2) for rank in range(2)]
    for rank in two:
        take(rank, 15)
    three = [stream(prepared, rank=rank, size=3) for rank in range(3)]
    for rank in three:
        rank.load_state_dict(two[0].state_dict())
    assert two[0].state_dict() == two[1].state_dict()
    together = [rows for _ in range(20) for rows in (next(rank) for rank in three)]
    assert equal(together, full[30:])


def test_compressed_shards_give_the_same_rows_also_when_a_kill_left_a_partial_file(compressed_copy, prepared):
    (compressed_copy / "train" / "shard.00000.00000.mds.tmp").write_bytes(b"half a sh")
    (compressed_copy / "train" / "shard.00001.00000.mds").write_bytes(b"half a shard")
    assert equal(take(stream(compressed_copy), 300), take(stream(prepared), 300))
    ssa_pipelines.verify(compressed_copy)


def test_a_process_killed_while_it_decompresses_does_not_block_others(compressed_copy):
    """The kernel drops the lock on the compressed file with its owner, so the waiting stream continues at once."""
    shards = sorted((compressed_copy / "validation").glob("*.zstd"))
    program = (
        "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held'); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-uc", program, shards[0]], stdout=subprocess.PIPE, env=environment()
    ) as owner:
        assert owner.stdout.readline() == b"held\n"
        got = []
        rows = stream(compressed_copy, split="validation", shuffle=False, read_ahead=0)
        reader = threading.Thread(target=lambda: got.append(next(rows)))
        reader.start()
        reader.join(0.3)
        assert reader.is_alive()
        assert not got
        owner.send_signal(signal.SIGKILL)
        reader.join(20)
    assert len(got) == 1


class TestRefusesAStateOf:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("datasets", {"": "f" * 64}),
            ("split", "validation"),
            ("seed", 4),
            ("shuffle", False),
            ("shuffle_block", 9),
            ("phases", [[0, {"": 2.0}]]),
            ("digests", {"": "e" * 32}),
        ],
    )
    def test_another_run_with_both_values(self, prepared, field, value):
        rows = stream(prepared)
        own = rows.state_dict()
        id = "order-changed" if field == "digests" else "position-of-other-data"
        with raises(DatasetMismatch, id) as caught:
            rows.load_state_dict({**own, field: value})
        label, before, here = {"datasets": "dataset", "digests": "order"}.get(field, field), value, own[field]
        if field == "datasets":
            before, here = before[""], here[""]
        for mention in (label, before, here):
            assert str(mention) in caught.value.problem
        assert caught.value.remedy
        assert rows.state_dict() == own

    @pytest.mark.parametrize("change", [{"format": 1}, {"samples_seen": -1}, {"samples_seen": None}])
    def test_another_format(self, prepared, change):
        rows = stream(prepared)
        with raises(DatasetMismatch, "position-format"):
            rows.load_state_dict({**rows.state_dict(), **change})

    def test_other_data(self, prepared, compressed):
        with raises(DatasetMismatch, "position-of-other-data", "dataset"):
            stream(prepared).load_state_dict(stream(compressed).state_dict())


class TestDamageIsAlwaysAnErrorThatNamesTheShard:
    @pytest.mark.parametrize("which", ["plain", "compressed"])
    @pytest.mark.parametrize(
        ("name", "damage", "id"),
        [
            ("missing", lambda path: path.unlink(), "shard-missing"),
            ("empty", lambda path: truncate(path, 0), "shard-truncated"),
            ("half", lambda path: truncate(path, path.stat().st_size // 2), "shard-truncated"),
            ("one byte", lambda path: truncate(path, path.stat().st_size - 1), "shard-truncated"),
        ],
    )
    def test_on_opening(self, which, name, damage, id, request):
        path = request.getfixturevalue({"plain": "dataset", "compressed": "compressed_copy"}[which])
        shard = sorted((path / "train").glob("*.mds*"))[2]
        damage(shard)
        with raises(ShardError, id) as caught:
            stream(path)
        assert caught.value.shard == str(shard)

    @pytest.mark.parametrize("read_ahead", [0, 2])
    @pytest.mark.parametrize("where", [0.2, 0.5, 0.99])
    def test_on_reading_a_flipped_bit_on_every_call(self, dataset, where, read_ahead):
        shard = sorted((dataset / "train").glob("*.mds"))[2]
        flip_bit(shard, int(shard.stat().st_size * where))
        rows = stream(dataset, read_ahead=read_ahead)
        with raises(ShardError, "row-unreadable") as caught:
            take(rows, rows.rows_per_epoch)
        assert caught.value.shard == str(shard)
        before = rows.samples_seen
        with raises(ShardError, "row-unreadable"):
            next(rows)
        assert rows.samples_seen == before

    def test_on_reading_a_compressed_one(self, compressed_copy):
        shard = sorted((compressed_copy / "train").glob("*.zstd"))[2]
        flip_bit(shard, shard.stat().st_size // 2)
        rows = stream(compressed_copy)
        with raises(ShardError, "shard-altered") as caught:
            take(rows, rows.rows_per_epoch)
        assert caught.value.shard == str(shard)

    @pytest.mark.parametrize("damage", [os.remove, lambda path: os.truncate(path, 500)], ids=["removed", "truncated"])
    def test_when_it_happens_during_the_run(self, dataset, damage):
        rows = stream(dataset)
        take(rows, 5)
        for shard in (dataset / "train").glob("*.mds"):
            damage(shard)
        with raises(ShardError, "row-unreadable", "train/shard."):
            take(rows, 10)

    def test_in_the_index(self, dataset):
        flip_bit(dataset / "train" / "index.json", 300)
        with raises(ShardError, "shard-altered") as caught:
            stream(dataset)
        assert caught.value.shard == str(dataset / "train" / "index.json")

    def test_when_shards_were_exchanged(self, dataset):
        """Valid rows in the wrong file, perhaps of the same size: only verification compares the sha256."""
        first, second = sorted((dataset / "train").glob("*.mds"))[:2]
        data = first.read_bytes(), second.read_bytes()
        first.write_bytes(data[1])
        second.write_bytes(data[0])
        with pytest.raises(ShardError) as caught:
            ssa_pipelines.verify(dataset)
        assert caught.value.shard == str(first)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"rank": 2, "size": 2}, ("data-parallel-layout", "data_parallel_rank 2", "data_parallel_size 2")),
        ({"micro": 0}, ("data-parallel-layout", "micro_batch_rows 0")),
        ({"batch": 13}, ("batch-not-a-multiple", "global_batch_rows 13", "micro_batch_rows 2", "data_parallel_size 1")),
        ({"size": 5}, ("batch-not-a-multiple", "global_batch_rows 12", "micro_batch_rows 2", "data_parallel_size 5")),
        ({"seed": -1}, ("negative-setting", "seed -1")),
        ({"split": "test"}, ("unknown-split", "'test'", "train, validation")),
    ],
)
def test_an_impossible_layout_or_split_is_refused(prepared, options, expected):
    with raises(DatasetError, *expected):
        stream(prepared, **options)


class TestEvaluationRows:
    def evaluate(self, path, *, rows=12, micro=2, rank=0, size=1, **options):
        layout = {"micro_batch_rows": micro, "data_parallel_rank": rank, "data_parallel_size": size}
        return ssa_pipelines.evaluation_rows(path, rows=rows, **layout, **options)

    def test_are_the_first_ones_as_packed_and_the_same_every_time(self, prepared):
        stored = take(stream(prepared, split="validation", shuffle=False), 6)
        assert equal(list(self.evaluate(prepared)), stored)
        assert equal(list(self.evaluate(prepared)), stored)

    @pytest.mark.parametrize("size", [2, 3])
    def test_are_divided_among_the_ranks(self, prepared, size):
        ranks = [self.evaluate(prepared, rank=rank, size=size) for rank in range(size)]
        together = [rows for micro_batch in zip(*ranks, strict=True) for rows in micro_batch]
        assert equal(together, list(self.evaluate(prepared)))

    def test_more_rows_than_the_split_has_are_refused_at_once(self, prepared):
        held = ssa_pipelines.load_dataset_info(prepared).splits["validation"].rows
        with raises(DatasetError, "too-few-rows", "rows 10000", f"holds {held}"):
            self.evaluate(prepared, rows=10_000)
        with raises(DatasetError, "batch-not-a-multiple", "rows 7", "micro_batch_rows 2"):
            self.evaluate(prepared, rows=7)

    def test_a_dataset_without_a_validation_split_is_refused(self, tmp_path, documents, tokenizer):
        ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", row_length=77, validation_fraction=0)
        with raises(DatasetError, "unknown-split", "'validation'") as caught:
            self.evaluate(tmp_path / "data")
        assert "validation_fraction" in caught.value.remedy


def test_a_read_only_dataset_can_be_streamed(dataset):
    for path in [dataset, *dataset.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    assert len(take(stream(dataset), 20)) == 20
    for path in [dataset, *dataset.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(dataset)


def test_plain_shards_are_read_without_file_locks(prepared, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("a plain dataset must not need locks"))
    assert len(take(stream(prepared), 20)) == 20
