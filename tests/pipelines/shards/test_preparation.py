"""A prepared dataset holds every document, is the same bytes each time, and appears whole or not at all."""

import collections
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

import ssa_pipelines
from ssa_pipelines import Access, CorpusError, DatasetError, DatasetMismatch, TokenizerError
from ssa_pipelines.shards.packing import NO_DOCUMENT
from ssa_pipelines.shards.row_reader import RowReader
from ssa_pipelines.storage.stores import s3 as s3_store
from tests.errors import raises
from tests.launch import environment
from tests.pipelines.support import ROW_LENGTH, SETTINGS, contents, flip_bit


def documents_by_number(path, split, tokenizer):
    """The documents of a split as text, assembled from the rows by document number."""
    reader, pieces = RowReader(ssa_pipelines.load_dataset_info(path), split), collections.defaultdict(list)
    for row in range(reader.rows):
        tokens, starts, numbers = reader.read(row)
        for number, piece in zip(numbers.tolist(), np.split(tokens, starts[1:]), strict=True):
            if number != NO_DOCUMENT:
                pieces[number] += piece.tolist()
    documents = list(pieces.values())
    assert all(document[0] == tokenizer.bos_id and document[-1] == tokenizer.eos_id for document in documents)
    return {number: tokenizer.decode(tokens) for number, tokens in sorted(pieces.items())}


def documents_in(path, split, tokenizer):
    return list(documents_by_number(path, split, tokenizer).values())


def test_the_two_splits_together_hold_every_document_once(prepared, documents, tokenizer):
    train, validation = (documents_in(prepared, split, tokenizer) for split in ("train", "validation"))
    assert sorted(train + validation) == sorted(documents)
    assert not set(train) & set(validation)  # duplicates stay on one side
    kept = iter(documents)
    assert all(text in kept for text in train)  # in the order of the corpus
    assert 0.03 < len(validation) / len(documents) < 0.2


def test_the_record_counts_what_is_there(prepared, documents, tokenizer):
    info = ssa_pipelines.load_dataset_info(prepared)
    assert (info.row_length, info.vocab_size, info.token_dtype) == (ROW_LENGTH, 701, "uint16")
    assert info.tokenizer_fingerprint == tokenizer.fingerprint
    assert ssa_pipelines.Tokenizer.load(prepared / "tokenizer.model").fingerprint == tokenizer.fingerprint
    assert sum(split.documents for split in info.splits.values()) == len(documents)
    assert sum(split.text_bytes for split in info.splits.values()) == sum(len(text.encode()) for text in documents)
    tokens = sum(len(ids) + 2 for ids in tokenizer.encode(documents))
    assert sum(split.tokens for split in info.splits.values()) == tokens
    for split in info.splits.values():
        assert split.rows * ROW_LENGTH == split.tokens + split.padding
    assert len(info.splits["train"].files) > 5  # shards enough to shuffle


def test_unigram_figures_are_those_of_the_tokens_a_model_predicts(prepared, tokenizer):
    info = ssa_pipelines.load_dataset_info(prepared)
    counts = {}
    for split in ("train", "validation"):
        ids = [t for d in tokenizer.encode(documents_in(prepared, split, tokenizer)) for t in [*d, tokenizer.eos_id]]
        counts[split] = np.bincount(ids, minlength=701).astype(float)
    p = counts["train"] / counts["train"].sum()
    assert info.unigram_entropy == pytest.approx(-sum(x * np.log(x) for x in p if x), rel=1e-12)
    q = (counts["train"] + 1) / (counts["train"] + 1).sum()
    cross = -(counts["validation"] / counts["validation"].sum() * np.log(q)).sum()
    assert info.validation_unigram_cross_entropy == pytest.approx(cross, rel=1e-12)


def test_it_is_an_ordinary_mds_dataset(prepared):
    from streaming import LocalDataset

    for split in ("train", "validation"):
        samples = LocalDataset(str(prepared), split)
        assert len(samples) == ssa_pipelines.load_dataset_info(prepared).splits[split].rows
        assert samples[0]["tokens"].shape == (ROW_LENGTH,)


@pytest.mark.parametrize("options", [{}, {"compression": "zstd:3"}, {"validation_fraction": 0.0}], ids=str)
def test_preparing_twice_gives_the_same_bytes_with_any_number_of_workers(tmp_path, documents, tokenizer, options):
    settings = {**SETTINGS, **options}
    for name, workers in (("a", 1), ("b", 3)):
        ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / name, workers=workers, **settings)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a" / "validation").exists() == (settings["validation_fraction"] > 0)


def test_another_seed_holds_out_other_documents(tmp_path, prepared, documents, tokenizer):
    ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", **{**SETTINGS, "seed": 6})
    held_out = [set(documents_in(path, "validation", tokenizer)) for path in (prepared, tmp_path / "data")]
    assert held_out[0] != held_out[1]


def test_sources_are_read_and_progress_reaches_the_end(tmp_path, documents, tokenizer):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"body": text}) + "\n" for text in documents))
    seen = []
    record = ssa_pipelines.prepare(
        corpus, tokenizer, tmp_path / "data", text_field="body", progress=lambda *p: seen.append(p), **SETTINGS
    )[""]
    size, text = corpus.stat().st_size, sum(len(text.encode()) for text in documents)
    assert [p for p in seen if p[0] == "scanning"][-1] == ("scanning", size, size)
    assert seen[-1] == ("encoding", text, text)
    assert record["inputs"]["documents"] == len(documents)
    assert record["path"] == str(tmp_path / "data")


def test_an_existing_dataset_is_reused_only_when_made_from_the_same_inputs(dataset, documents, tokenizer):
    def again(texts=documents, **options):
        return ssa_pipelines.prepare(iter(texts), tokenizer, dataset, **{**SETTINGS, **options})

    before = contents(dataset)
    with raises(DatasetError, "dataset-exists", dataset):
        again()
    record = again(reuse=True)[""]
    assert record["reused"]
    assert record["fingerprint"] == ssa_pipelines.load_dataset_info(dataset).fingerprint
    with raises(DatasetMismatch, "dataset-of-other-inputs", "row_length", 77, 78):
        again(reuse=True, row_length=78)
    with raises(DatasetMismatch, "dataset-of-other-inputs", "documents", 125, 124):
        again(documents[:-1], reuse=True)
    with raises(DatasetMismatch, "dataset-of-other-inputs", "documents_sha256"):
        again([*documents[:-1], "other"], reuse=True)
    assert contents(dataset) == before


def test_a_folder_without_a_complete_dataset_is_not_reused(tmp_path, documents, tokenizer):
    (tmp_path / "data").mkdir()
    with raises(DatasetError, "not-a-dataset", tmp_path / "data"):
        ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", reuse=True, **SETTINGS)


def failing(documents):
    yield from documents[:200]
    raise CorpusError("the disk of the corpus is gone", id="disk-gone")


def test_an_error_midway_leaves_nothing_behind(tmp_path, documents, tokenizer):
    with raises(CorpusError, "disk-gone"):
        ssa_pipelines.prepare(failing(documents), tokenizer, tmp_path / "data", **SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_reported_and_the_next_attempt_continues(tmp_path, prepared, documents, tokenizer):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # less than a shard
    try:
        with raises(DatasetError, "dataset-not-written", tmp_path / "data", "File too large") as caught:
            ssa_pipelines.prepare(tmp_path / "corpus.jsonl", tokenizer, tmp_path / "data", **SETTINGS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.remedy
    ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", **SETTINGS)
    assert without_names(contents(tmp_path / "data")) == without_names(contents(prepared))
    assert sorted(os.listdir(tmp_path)) == ["corpus.jsonl", "data"]


def test_a_scratch_folder_on_another_disk_gives_the_same_bytes(tmp_path, prepared, documents, tokenizer):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        assert os.stat(other).st_dev != os.stat(tmp_path).st_dev
        ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", scratch=Path(other, "scratch"), **SETTINGS)
        assert os.listdir(other) == []
    assert contents(tmp_path / "data") == contents(prepared)
    assert os.listdir(tmp_path) == ["data"]


PREPARE_AND_DIE = """
import os, signal, sys, ssa_pipelines

def die_after(number):
    def progress(stage, done, total):
        global parts
        parts += stage == "encoding"
        if parts == number:
            os.kill(os.getpid(), signal.SIGKILL)
    return progress

if __name__ == "__main__":
    parts = 0
    ssa_pipelines.prepare(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), progress=die_after(4), **{SETTINGS})
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_after_sigkill_finished_parts_are_kept_and_the_bytes_are_the_same(
    tmp_path, prepared, documents, tokenizer, workers
):
    corpus, program = tmp_path / "corpus.jsonl", tmp_path / "program.py"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    program.write_text(PREPARE_AND_DIE.replace("{SETTINGS}", repr(SETTINGS)))
    command = [sys.executable, program, corpus, tokenizer.path, tmp_path / "data", str(workers)]
    killed = subprocess.run(command, env=environment(), timeout=120, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not (tmp_path / "data").exists()
    done = {path.name: path.stat().st_ino for path in (tmp_path / ".data.preparing" / "parts").glob("part-*")}
    assert len(done) >= 4
    kept = set()
    ssa_pipelines.prepare(corpus, tokenizer, tmp_path / "data", **SETTINGS, progress=lambda *p: kept.update(
        path.name for path in (tmp_path / ".data.preparing" / "parts").glob("part-*")
        if done.get(path.name) == path.stat().st_ino
    ))  # fmt: skip
    assert kept == set(done)
    assert without_names(contents(tmp_path / "data")) == without_names(contents(prepared))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["corpus.jsonl", "data", "program.py"]


def test_no_worker_outlives_a_killed_preparation(tmp_path, documents, tokenizer):
    corpus, program = tmp_path / "corpus.jsonl", tmp_path / "program.py"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    program.write_text(PREPARE_AND_DIE.replace("{SETTINGS}", repr(SETTINGS)))
    tag = f"test-{os.getpid()}"
    command = [sys.executable, program, corpus, tokenizer.path, tmp_path / "data", "2"]
    subprocess.run(command, env=environment(OURS=tag), timeout=120, capture_output=True)

    def ours() -> list[psutil.Process]:
        return [p for p in psutil.process_iter() if p.pid != os.getpid() and tag in environment_of(p).get("OURS", "")]

    end = time.monotonic() + 10
    while ours() and time.monotonic() < end:
        time.sleep(0.05)
    assert ours() == []


def environment_of(process) -> dict:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def test_parts_of_an_attempt_with_other_inputs_are_not_used(tmp_path, prepared, documents, tokenizer):
    corpus, program = tmp_path / "corpus.jsonl", tmp_path / "program.py"
    corpus.write_text("".join(json.dumps({"text": text[1:]}) + "\n" for text in documents))
    program.write_text(PREPARE_AND_DIE.replace("{SETTINGS}", repr(SETTINGS)))
    command = [sys.executable, program, corpus, tokenizer.path, tmp_path / "data", "1"]
    assert subprocess.run(command, env=environment(), timeout=120).returncode == -signal.SIGKILL
    corpus.unlink()
    ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", **SETTINGS)
    assert contents(tmp_path / "data") == contents(prepared)


def test_a_killed_worker_is_an_error_and_not_a_hang(tmp_path, documents, tokenizer):
    def kill_one(stage, done, total):
        if stage == "encoding":
            workers = [p for p in psutil.Process().children(recursive=True) if "forkserver" in " ".join(p.cmdline())]
            os.kill(max(workers, key=lambda p: p.create_time()).pid, signal.SIGKILL)

    began = time.monotonic()
    with raises(DatasetError, "worker-killed") as caught:
        ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", workers=2, progress=kill_one, **SETTINGS)
    assert time.monotonic() - began < 30
    assert caught.value.remedy
    assert not (tmp_path / "data").exists()


def test_text_that_changes_during_preparation_is_an_error(tmp_path, documents, tokenizer):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    changed = corpus.read_text().replace("beginning", "beginninG").replace("the", "teh")

    def change(stage, done, total):
        if stage == "scanning" and done == total:
            corpus.write_text(changed)

    with raises(CorpusError, "corpus-changed", corpus):
        ssa_pipelines.prepare(corpus, tokenizer, tmp_path / "data", progress=change, **SETTINGS)
    assert not (tmp_path / "data").exists()


def without_names(found: dict[str, bytes]) -> dict[str, bytes]:
    """All files except those that contain the names of the corpus files."""
    return {name: data for name, data in found.items() if name not in ("records.json", "dataset.json")}


def test_exact_duplicates_are_left_out_once_each_over_all_sources(tmp_path, documents, tokenizer):
    web, code = documents[:60] + documents[:5], documents[50:] + documents[:3]
    for name, texts in (("web", web), ("code", code)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = {name: tmp_path / f"{name}.jsonl" for name in ("web", "code")}
    found = ssa_pipelines.prepare(sources, tokenizer, tmp_path / "data", **SETTINGS)
    assert {name: record["duplicates"] for name, record in found.items()} == {"web": 5, "code": 13}
    got = [
        text
        for name in found
        for split in ("train", "validation")
        for text in documents_in(tmp_path / "data" / name, split, tokenizer)
    ]
    assert sorted(got) == sorted(documents)
    everything = ssa_pipelines.prepare(sources, tokenizer, tmp_path / "all", deduplicate=False, **SETTINGS)
    assert [record["duplicates"] for record in everything.values()] == [0, 0]
    train = documents_in(tmp_path / "all" / "web", "train", tokenizer)
    validation = documents_in(tmp_path / "all" / "web", "validation", tokenizer)
    assert sorted(train + validation) == sorted(web)
    assert not set(train) & set(validation)  # duplicates stay on one side
    for name in sources:
        ssa_pipelines.verify(tmp_path / "data" / name)


def test_every_row_records_the_documents_it_holds(prepared, documents, tokenizer):
    info = ssa_pipelines.load_dataset_info(prepared)
    assert json.loads((prepared / "records.json").read_text()) == [["documents", len(documents)]]
    train, validation = (documents_by_number(prepared, split, tokenizer) for split in info.splits)
    assert {**train, **validation} == dict(enumerate(documents))


def test_only_the_last_row_of_a_split_is_padded_whatever_the_parts(prepared):
    for split in ssa_pipelines.load_dataset_info(prepared).splits.values():
        assert 0 <= split.padding < ROW_LENGTH


def test_a_dataset_in_an_object_store_is_the_same_bytes(s3, tmp_path, prepared, documents, tokenizer):
    out = "s3://bucket/some/data"
    found = ssa_pipelines.prepare(iter(documents), tokenizer, out, scratch=tmp_path / "scratch", **SETTINGS)
    assert found[""]["path"] == out
    assert {key: s3.get(f"some/data/{key}") for key in contents(prepared)} == contents(prepared)
    assert len(s3.keys("some/data")) == len(contents(prepared))
    assert list(tmp_path.iterdir()) == []
    with raises(DatasetError, "dataset-exists", out):
        ssa_pipelines.prepare(iter(documents), tokenizer, out, **SETTINGS)


def test_a_store_that_vanishes_while_it_is_written_is_named_and_the_next_attempt_continues(
    s3, tmp_path, prepared, documents, tokenizer, monkeypatch
):
    out, corpus = "s3://bucket/some/data", tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    monkeypatch.setattr(s3_store, "TROUBLE_SECONDS", 1)
    s3_store.s3_client.cache_clear()
    options = {"scratch": tmp_path / "scratch", **SETTINGS}

    def vanish(stage, done, total):
        if stage == "encoding" and done > total // 2:
            s3.stop()

    began = time.monotonic()
    with raises(DatasetError, "not-uploaded", f"{out}/train/shard.") as caught:
        ssa_pipelines.prepare(corpus, tokenizer, out, progress=vanish, **options)
    assert time.monotonic() - began < 30
    assert "S3_ENDPOINT_URL" in caught.value.remedy
    done = len(list((tmp_path / "scratch" / "parts").glob("part-*")))
    assert done > 2
    s3.start()
    with raises(DatasetError, "object-missing", "dataset.json"):  # not taken for a dataset
        ssa_pipelines.load_dataset_info(out, Access(tmp_path / "cache"))
    ssa_pipelines.prepare(corpus, tokenizer, out, **options)
    stored = {key: s3.get(f"some/data/{key}") for key in contents(prepared)}
    assert without_names(stored) == without_names(contents(prepared))
    assert (
        ssa_pipelines.verify(out)["splits"]["train"]["rows"]
        == ssa_pipelines.load_dataset_info(prepared).splits["train"].rows
    )


def test_a_second_writer_of_the_same_folder_is_refused_while_the_first_lives(tmp_path, documents, tokenizer):
    (tmp_path / ".data.preparing").mkdir()
    with open(tmp_path / ".data.preparing" / "lock", "w") as owner:
        fcntl.flock(owner, fcntl.LOCK_EX)
        with raises(DatasetError, "dataset-being-prepared", tmp_path / "data"):
            ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", **SETTINGS)
    ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", **SETTINGS)
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"row_length": 1}, ("row-length", "row_length 1")),
        ({"validation_fraction": 1.0}, ("validation-fraction", "validation_fraction 1.0")),
        ({"validation_fraction": -0.1}, ("validation-fraction", "validation_fraction -0.1")),
        ({"compression": "rar"}, ("unknown-shard-compression", "'rar'")),
        ({"shard_size": 1000}, ("shard-size", "shard_size 1000")),
        ({"shard_size": 1 << 32}, ("shard-size", "shard_size 4294967296")),
        ({"validation_fraction": 1e-9}, ("empty-split", "validation_fraction 1e-09", 125, "validation split")),
        ({"validation_fraction": 1 - 1e-9}, ("empty-split", 125, "train split")),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, documents, tokenizer, options, expected):
    with raises((DatasetError, CorpusError), *expected) as caught:
        ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", **{**SETTINGS, **options})
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_or_a_tokenizer_that_is_missing_is_refused(tmp_path, tokenizer):
    with raises(CorpusError, "source-missing", tmp_path / "absent.jsonl"):
        ssa_pipelines.prepare(tmp_path / "absent.jsonl", tokenizer, tmp_path / "data", **SETTINGS)
    with raises(TokenizerError, "tokenizer-unreadable", tmp_path / "absent.model"):
        ssa_pipelines.prepare("package:king-james", tmp_path / "absent.model", tmp_path / "data", **SETTINGS)


def test_a_damaged_or_foreign_record_is_refused(dataset):
    record = dataset / "dataset.json"
    good = record.read_text()
    for text, expected in (
        (good.replace('"rows": ', '"rows": 1'), ("dataset-altered",)),
        (good.replace('"format": 2', '"format": 9'), ("dataset-format", "format 9")),
        (good[: len(good) // 2], ("dataset-damaged",)),
        ("[]", ("dataset-damaged",)),
    ):
        record.write_text(text)
        with raises(DatasetError, *expected, record):
            ssa_pipelines.load_dataset_info(dataset)
    record.unlink()
    with raises(DatasetError, "not-a-dataset", dataset, "dataset.json"):
        ssa_pipelines.load_dataset_info(dataset)


def test_a_dataset_for_another_recipe_is_refused_with_both_values(prepared, tokenizer):
    info = ssa_pipelines.load_dataset_info(prepared)
    fits = {"tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": 701, "row_length": 77}
    ssa_pipelines.check_compatible(info, **fits)
    ssa_pipelines.check_compatible(info, **{**fits, "vocab_size": 128256})  # a model may have rows to spare
    with raises(DatasetMismatch, "vocabulary-larger-than-model", "vocab_size", 701, 700):
        ssa_pipelines.check_compatible(info, **{**fits, "vocab_size": 700})
    for field, value in (("tokenizer_fingerprint", "0" * 64), ("row_length", 1024)):
        with raises(DatasetMismatch, "dataset-unlike-recipe", field, fits[field], value):
            ssa_pipelines.check_compatible(info, **{**fits, field: value})


def test_stats_are_ratios_of_what_the_record_counts(prepared):
    info, report = ssa_pipelines.load_dataset_info(prepared), ssa_pipelines.stats(prepared)
    train = info.splits["train"]
    assert report["splits"]["train"]["bytes_per_token"] == train.text_bytes / train.tokens
    assert report["splits"]["train"]["shards"] == len(list((prepared / "train").glob("*.mds")))
    assert report["splits"]["validation"]["rows"] == info.splits["validation"].rows


class TestVerification:
    def test_a_whole_dataset_passes_and_is_not_touched(self, dataset, compressed_copy):
        for path in (dataset, compressed_copy):
            before, seen = contents(path), []
            report = ssa_pipelines.verify(path, progress=lambda *p, seen=seen: seen.append(p))
            info = ssa_pipelines.load_dataset_info(path)
            assert {n: s["rows"] for n, s in report["splits"].items()} == {n: s.rows for n, s in info.splits.items()}
            assert len(seen) == sum(len(s.files) - 1 for s in info.splits.values())
            assert contents(path) == before

    @pytest.mark.parametrize("which", ["plain", "compressed"])
    @pytest.mark.parametrize("split", ["train", "validation"])
    @pytest.mark.parametrize(
        ("name", "damage", "id"),
        [
            ("missing", lambda path: path.unlink(), "shard-missing"),
            ("empty", lambda path: path.write_bytes(b""), "shard-truncated"),
            ("short", lambda path: path.write_bytes(path.read_bytes()[:-1]), "shard-truncated"),
            ("long", lambda path: path.write_bytes(path.read_bytes() + b"x"), "shard-too-long"),
            ("header", lambda path: flip_bit(path, 1), "shard-altered"),
            ("data", lambda path: flip_bit(path, path.stat().st_size // 2), "shard-altered"),
        ],
    )
    def test_a_damaged_shard_is_named(self, which, split, name, damage, id, request):
        path = request.getfixturevalue({"plain": "dataset", "compressed": "compressed_copy"}[which])
        shard = sorted((path / split).glob("*.mds*"))[-1]
        damage(shard)
        with raises(ssa_pipelines.ShardError, id) as caught:
            ssa_pipelines.verify(path)
        assert caught.value.shard == str(shard)
        assert str(shard) in str(caught.value)

    @pytest.mark.parametrize("name", ["train/index.json", "tokenizer.model"])
    def test_a_damaged_index_or_tokenizer_is_named(self, dataset, name):
        flip_bit(dataset / name, 40)
        with raises(ssa_pipelines.ShardError, "shard-altered") as caught:
            ssa_pipelines.verify(dataset)
        assert caught.value.shard == str(dataset / name)
