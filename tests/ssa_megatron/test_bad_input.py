"""Bad input on the command line: its own exit code, the field or file at fault, what to do, and nothing half-written."""

import json
import re
import shutil
import socket
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import ssa_pipelines
from ssa_cluster.exit_codes import ending
from ssa_megatron.checkpoint.manifest import committed
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.run_folder import RunFolder
from ssa_megatron.train.schedules import schedule_of
from tests.launch import run
from tests.ssa_megatron.support import recipe_file, tiny

CONFIG, DATA, CHECKPOINT, RUN_FOLDER, STOPPED = 2, 3, 4, 5, 6


@dataclass
class Place:
    """What the cases work on; `new` is a path that must not exist afterwards."""

    root: Path
    dataset: Path
    recipe: Path = None
    new: Path = None
    trained: Path = None
    copies: dict[str, Path] = field(default_factory=dict)

    def trained_copy(self, name: str) -> Path:
        self.copies[name] = Path(shutil.copytree(self.trained, self.root / name))
        return self.copies[name]

    def dataset_copy(self, name: str) -> Path:
        self.copies[name] = Path(shutil.copytree(self.dataset, self.root / name))
        return self.copies[name]

    def train(self, *overrides: str, into: Path | None = None) -> list[str]:
        return ["train", str(self.recipe), *overrides, "--run-folder", str(into or self.new)]


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _dataset_with_another_tokenizer(place: Place) -> list[str]:
    copy = place.dataset_copy("mixed")
    shutil.copyfile(place.copies["other"] / "tokenizer.model", copy / "tokenizer.model")
    return place.train(f"data.path={copy}")


def _edited_dataset(place: Place) -> list[str]:
    copy = place.dataset_copy("edited")
    text = (copy / "dataset.json").read_text()
    (copy / "dataset.json").write_text(text.replace('"row_length": 33', '"row_length": 34'))
    return place.train(f"data.path={copy}")


def _damaged_checkpoints(place: Place) -> list[str]:
    copy = place.trained_copy("damaged")
    for share in copy.glob("checkpoints/step-*/rank-*"):
        _flip_last_byte(share)
    return place.train(into=copy)


def _empty_file(place: Place) -> str:
    (place.root / "empty.txt").write_text("\n \n")
    return str(place.root / "empty.txt")


def _binary_recipe(place: Place) -> list[str]:
    (place.root / "binary.yaml").write_bytes(b"\xff\xfe\x80name")
    return ["train", str(place.root / "binary.yaml")]


def _file(place: Place) -> Path:
    (place.root / "a-file").write_text("not a folder")
    return place.root / "a-file"


def _prepare(place: Place, source: str, tokenizer: Path | None = None) -> list[str]:
    tokenizer = tokenizer or place.dataset / "tokenizer.model"
    return ["data", "prepare", source, "--tokenizer", str(tokenizer), "--out", str(place.new), "--row-length", "33"]


def _tokenizer(place: Place, source: str, size: int = 400) -> list[str]:
    return ["tokenizer", "train", source, "--out", str(place.new), "--vocab-size", str(size)]


# case -> (exit code, error id, command line, fields, values and paths its message mentions)
CASES = {
    "unknown recipe": (CONFIG, "no-such-recipe", lambda p: ["train", "ssa1b"], ["'ssa1b'", "'ssa-1b'"]),
    "recipe file missing": (CONFIG, "recipe-unreadable", lambda p: ["train", "no/such.yaml"], ["no/such.yaml"]),
    "mistyped key": (CONFIG, "unknown-key", lambda p: p.train("train.stepps=3"), ["train.stepps", "'steps'"]),
    "impossible value": (
        CONFIG,
        "micro-batch-divides",
        lambda p: p.train("train.micro_batch_rows=3"),
        ["train.micro_batch_rows=3"],
    ),
    "illegal topology": (
        CONFIG,
        "world-size",
        lambda p: p.train("parallel.tensor=2"),
        ["world size", "1 process(es)", "tensor=2"],
    ),
    "a truth value for a number": (
        CONFIG,
        "number-not-truth-value",
        lambda p: p.train("train.steps=true"),
        ["train.steps", "True"],
    ),
    "a seed no generator takes": (
        CONFIG,
        "less-than",
        lambda p: p.train("train.seed=18446744073709551616"),
        ["train.seed", "18446744073709551616"],
    ),
    "a selection that does not exist": (
        CONFIG,
        "topk-shape",
        lambda p: p.train("attention.topk=reference"),
        ["topk=reference", "block_size=4"],
    ),
    "kernels the machine cannot run": (
        CONFIG,
        "triton-on-cpu",
        lambda p: p.train("attention.backend=triton"),
        ["attention.backend=triton", "attention.backend=auto"],
    ),
    "evaluation larger than the split": (
        CONFIG,
        "eval-rows-exceed-split",
        lambda p: p.train("train.eval_interval=2", "train.eval_rows=100000"),
        ["train.eval_rows=100000"],
    ),
    "a recipe that is not text": (CONFIG, "recipe-not-text", _binary_recipe, ["binary.yaml"]),
    "a recipe name too long for a file": (CONFIG, "no-such-recipe", lambda p: ["train", "x" * 300], ["x" * 300]),
    "no dataset given": (CONFIG, "no-dataset", lambda p: p.train("data.path=null"), ["data.path", "data.sources"]),
    "dataset missing": (DATA, "not-a-dataset", lambda p: p.train(f"data.path={p.root}/nothing"), ["nothing"]),
    "dataset edited by hand": (DATA, "dataset-altered", _edited_dataset, ["dataset.json"]),
    "tokenizer larger than the model's vocabulary": (
        DATA,
        "vocabulary-larger-than-model",
        lambda p: p.train("model.vocab_size=53"),
        ["vocab_size", "400", "53", "model.vocab_size"],
    ),
    "shards made with another tokenizer": (
        DATA,
        "dataset-unlike-recipe",
        _dataset_with_another_tokenizer,
        ["tokenizer_fingerprint"],
    ),
    "shards of another row length": (
        DATA,
        "dataset-unlike-recipe",
        lambda p: p.train("train.sequence_length=32"),
        ["row_length", "33", "32"],
    ),
    "run folder in use": (
        RUN_FOLDER,
        "run-folder-in-use",
        lambda p: p.train(into=p.copies["busy"]),
        ["busy", "--run-folder"],
    ),
    "run folder is a file": (
        RUN_FOLDER,
        "run-folder-not-written",
        lambda p: p.train(into=_file(p)),
        ["a-file", "--run-folder"],
    ),
    "run folder of another recipe": (
        RUN_FOLDER,
        "run-of-another-recipe",
        lambda p: p.train("train.seed=9", into=p.copies["untouched"]),
        ["train.seed: 1234 -> 9", "--run-folder"],
    ),
    "every checkpoint damaged": (
        CHECKPOINT,
        "no-intact-checkpoint",
        _damaged_checkpoints,
        ["step-00000003", "rank-00000-000.safetensors", "sha256"],
    ),
    "run continued with data of another tokenizer": (
        CHECKPOINT,
        "another-tokenizer",
        lambda p: p.train(f"data.path={p.copies['other']}", into=p.trained_copy("foreign tokenizer")),
        ["tokenizer"],
    ),
    "run continued with other data": (
        DATA,
        "position-of-other-data",
        lambda p: p.train(f"data.path={p.copies['other text']}", into=p.trained_copy("foreign data")),
        ["dataset"],
    ),
    "training that explodes": (
        STOPPED,
        "non-finite-loss",
        lambda p: p.train(
            *("optimizer.lr=1e37", "train.steps=9", "schedule.warmup_fraction=0"),
            *("checkpoint.interval=1", "checkpoint.keep=1"),
            into=p.copies["exploded"],
        ),
        ["3 steps", "rows"],
    ),
    "corpus missing": (DATA, "source-missing", lambda p: _prepare(p, f"{p.root}/no-text.txt"), ["no-text.txt"]),
    "corpus empty": (DATA, "corpus-empty", lambda p: _prepare(p, _empty_file(p)), ["empty.txt"]),
    "tokenizer missing": (
        DATA,
        "tokenizer-unreadable",
        lambda p: _prepare(p, _empty_file(p), p.root / "no.model"),
        ["no.model"],
    ),
    "corpus of a tokenizer missing": (
        DATA,
        "source-missing",
        lambda p: _tokenizer(p, f"{p.root}/no-text.txt"),
        ["no-text.txt"],
    ),
    "corpus of a tokenizer empty": (
        DATA,
        "corpus-empty",
        lambda p: _tokenizer(p, _empty_file(p)),
        ["empty.txt"],
    ),
}


@pytest.fixture(scope="module")
def place(dataset, corpus, tokenizer, tmp_path_factory) -> Place:
    place = Place(tmp_path_factory.mktemp("place"), dataset)
    place.recipe = recipe_file(place.root, dataset)
    place.new = place.root / "new"
    place.trained = place.root / "trained"
    other = ssa_pipelines.train_tokenizer(iter(corpus), place.root / "other.model", vocab_size=390)
    for name, made_with, text in (("other", other, corpus), ("other text", tokenizer, corpus[:-1])):
        place.copies[name] = place.root / name
        ssa_pipelines.prepare(iter(text), made_with, place.copies[name], row_length=33, validation_fraction=0.1)
    run(1, "ssa_megatron", *place.train(into=place.trained), timeout=90)
    place.trained_copy("untouched")
    place.trained_copy("fallback")
    place.copies["exploded"] = place.root / "exploded"
    return place


@pytest.fixture(scope="module")
def answers(place) -> dict[str, dict]:
    """{case: {"code", "output"}}, all from one start of Python; see tests/workers/command_lines.py."""
    lines = {case: line(place) for case, (_, _, line, _) in CASES.items() if case != "run folder in use"}
    newest = place.copies["fallback"] / "checkpoints" / "step-00000003"
    _flip_last_byte(newest / "rank-00000-000.safetensors")
    lines["fallback"] = place.train(into=place.copies["fallback"])
    owned = RunFolder(place.trained_copy("busy"))
    owned.lock()
    lines["run folder in use"] = CASES["run folder in use"][2](place)
    (place.root / "cases.json").write_text(json.dumps(list(lines.values())))
    run(1, "tests.workers.command_lines", str(place.root / "cases.json"), str(place.root / "out.json"), timeout=200)
    return dict(zip(lines, json.loads((place.root / "out.json").read_text()), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_with_its_exit_code_and_a_message_that_names_field_and_remedy(answers, case):
    code, id, _, mentions = CASES[case]
    answer = answers[case]
    assert answer["code"] == code, answer["output"]
    found = re.search(r"^error\[([a-z0-9-]+)\]: .*", answer["output"], re.MULTILINE | re.DOTALL)
    assert found, answer["output"]
    assert found[1] == id
    for word in (*mentions, "remedy: "):
        assert word in found[0]
    assert "Traceback" not in answer["output"]


def test_nothing_is_written_where_the_output_would_have_gone(answers, place):
    assert not place.new.exists()
    beside = {path.name for path in place.root.iterdir()}
    assert not [name for name in beside if name.startswith((".tmp", "new"))]


def test_a_refused_run_folder_keeps_every_byte_of_its_run(answers, place):
    def contents(folder: Path) -> dict[str, bytes]:
        files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        of_the_job = ("owner.lock", "heartbeats")  # who tried last, and how that ended
        return {name: content for name, content in files.items() if not name.startswith(of_the_job)}

    assert contents(place.copies["untouched"]) == contents(place.trained)
    assert contents(place.copies["busy"]) == contents(place.trained)
    for refused in ("foreign data", "foreign tokenizer"):
        assert contents(place.copies[refused]) == contents(place.trained)


def test_checkpoints_from_before_an_explosion_are_not_pushed_out_by_those_of_skipped_steps(answers, place):
    lines = read_metrics(place.copies["exploded"] / "metrics.jsonl")
    last_applied = max(line["step"] for line in lines if line["applied"])
    kept = [int(path.name[5:]) for path in committed(place.copies["exploded"])]
    assert kept == [last_applied]
    assert f"no checkpoint at step {lines[-1]['step']}: it was skipped" in answers["training that explodes"]["output"]


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_line_and_the_run_ends_as_it_would_have(answers, place):
    answer = answers["fallback"]
    assert answer["code"] == 0, answer["output"]
    assert "checkpoint step-00000003 is not used: " in answer["output"]
    assert "restored step-00000002" in answer["output"]
    losses = [
        [line["loss"].hex() for line in read_metrics(run / "metrics.jsonl")]
        for run in (place.trained, place.copies["fallback"])
    ]
    assert len(losses[0]) == 3
    assert losses[0] == losses[1]


def test_skipped_steps_are_counted_and_do_not_advance_the_learning_rate(answers, place):
    lines = read_metrics(place.copies["exploded"] / "metrics.jsonl")
    recipe = tiny(optimizer__lr=1e37, train__steps=9, schedule__warmup_fraction=0.0)
    applied = [line["applied"] for line in lines]
    assert applied[0]
    assert applied[-3:] == [False] * 3
    assert [line["skipped_steps"] for line in lines] == [applied[: i + 1].count(False) for i in range(len(lines))]
    assert [line["lr"] for line in lines] == [
        schedule_of(recipe).lr(applied[:i].count(True)) for i in range(len(lines))
    ]
    first, last = (lines[-1]["step"] - 1) * 4, lines[-1]["step"] * 4 - 1
    assert (
        f"the last is step {lines[-1]['step']}, rows {first}..{last} of the stream"
        in answers["training that explodes"]["output"]
    )


@pytest.mark.parametrize(
    ("arguments", "id", "mentions"),
    [
        (("train", "demos"), "no-such-recipe", "'demo'"),
        (("train", "demo", "train.stepz=1"), "unknown-key", "train.stepz"),
        (("train", "demo", "train.steps=-1"), "greater-than-equal", "(got -1)"),
        (("config", "demo", "optimizer.lr=.inf"), "finite-number", "(got inf)"),
    ],
)
def test_python_m_ssa_megatron_ends_with_the_same_codes(arguments, id, mentions):
    output = run(1, "ssa_megatron", *arguments, timeout=30, expect=CONFIG)
    assert output.startswith(f"error[{id}]: ")
    assert mentions in output
    assert "remedy: " in output


def test_a_meeting_port_that_another_process_took_is_no_hopeless_error():
    """Launchers find a port free and let it go for rank 0; exit 1 is a crash, after which they start again at another."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        launched = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", **place}
        output = run(1, "tests.workers.meet", expect=1, **launched)
    assert "error[port-taken]: " in output
    assert f"127.0.0.1:{place['MASTER_PORT']}" in output
    assert ending([1, -15]) is None  # the launcher's reading of it: worth a restart
    assert run(1, "tests.workers.meet", **launched).strip().endswith("met")
