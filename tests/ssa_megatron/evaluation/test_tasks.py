"""Tasks through lm-eval: its own code, batches larger than one, no network; and clear words where it is missing."""

import importlib.util
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch

from ssa_megatron.errors import ConfigError, DataProblem, EnvironmentProblem
from ssa_megatron.evaluation import tasks
from ssa_megatron.evaluation.measure_settings import Settings
from tests.errors import raises
from tests.ssa_megatron.hf.conftest import corpus

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="no lm-eval: pip install -e '.[evaluation]'"
)


def questions() -> list[dict]:
    """Which of two is the rest of the line? Lengths differ, so that batches are padded."""
    draw, lines = random.Random(2), [line for line in corpus().splitlines() if len(line) > 60]
    found = []
    for number in range(24):
        line, other = draw.sample(lines, 2)
        cut = draw.randint(10, 40)
        choices = [line[cut:], other[cut : cut + draw.randint(8, 40)]]
        found.append({"question": line[:cut], "choices": choices[:: 1 if number % 2 else -1], "answer": 1 - number % 2})
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "go on.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions()))
    return path


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with raises(EnvironmentProblem, "lm-eval-missing", "--tasks", ".[evaluation]") as raised:
        tasks.check(["piqa"])
    assert raised.value.exit_code == 7


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "JSON"),
        ('{"question": "a", "choices": ["b", "c"]}', "answer"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "choices"),
        ('{"question": "a", "choices": ["b", 3], "answer": 0}', "choice"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "answer 2"),
    ],
)
def test_damaged_questions_are_refused_with_their_line(file, tmp_path, line, named):
    with file.open() as good:
        first = good.readline()
    file.write_text(f"{first}{line}\n")
    with raises(DataProblem, "question-malformed", file, "line 2", named):
        tasks._from_questions(file, tmp_path)


def test_files_that_are_none_are_refused(tmp_path):
    with raises(DataProblem, "questions-unreadable", tmp_path / "missing.jsonl"):
        tasks._from_questions(tmp_path / "missing.jsonl", tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with raises(DataProblem, "questions-empty", tmp_path / "empty.jsonl"):
        tasks._from_questions(tmp_path / "empty.jsonl", tmp_path)
    (tmp_path / "t.yaml").write_text("dataset_path: json\n")
    with raises(DataProblem, "task-without-name", tmp_path / "t.yaml"):
        tasks._name_in(tmp_path / "t.yaml")


@needs_library
def test_accuracy_is_that_of_the_likelihoods_in_both_modes(tiny, file):
    found = tasks.run(tiny, Settings(parts=("tasks",), tasks=(str(file),), task_batch=5))
    modes = ("full", "sparse")
    assert [(row["task"], row["mode"], row["documents"]) for row in found["rows"]] == [
        ("go_on", mode, 24) for mode in modes
    ]
    assert tiny.model.config.inference_mode == "full"
    for row in found["rows"]:
        assert row["acc"] == pytest.approx(accuracy(tiny, row["mode"]))
        assert 0 < row["acc"] < 1
        assert 0 < row["acc_stderr"] < 0.2
        assert 0 <= row["acc_norm"] <= 1


def accuracy(tiny, mode: str) -> float:
    right = 0
    for question in questions():
        scores = [likelihood(tiny, question["question"], choice, mode) for choice in question["choices"]]
        right += scores.index(max(scores)) == question["answer"]
    return right / 24


def likelihood(tiny, question: str, choice: str, mode: str) -> float:
    """As lm-eval says it does: the delimiter, and spaces at the question's end, belong to the continuation."""
    context = tiny.tokenizer(question.rstrip())["input_ids"]
    whole = tiny.tokenizer(f"{question} {choice}")["input_ids"]
    with torch.inference_mode():
        logits = tiny.model(torch.tensor([whole]), use_cache=False, inference_mode=mode).logits[0]
    return sum(logits[i - 1].log_softmax(-1)[whole[i]].item() for i in range(len(context), len(whole)))


@needs_library
@pytest.mark.slow
def test_unknown_tasks_are_refused(file):
    with raises(ConfigError, "unknown-task", "'piqqa'"):
        tasks.check(["piqqa", str(file)])


@needs_library
@pytest.mark.slow
@pytest.mark.timeout(700)
def test_lm_eval_itself_runs_an_exported_folder_in_batches(tiny, folder, file, tmp_path):
    """Its own command line, with nothing of ours in the process but the folder."""
    tasks._from_questions(file, tmp_path)
    model = f"pretrained={folder},trust_remote_code=True,dtype=float32,inference_mode=sparse"
    command = ["-m", "lm_eval", "run", "--model", "hf", "--model_args", model, "--tasks", "go_on", "--batch_size", "4",
               "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json"), "--device", "cpu"]  # fmt: skip
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=os.environ | home, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = (line for line in done.stdout.splitlines() if re.search(r"\bacc\b", line))
    assert "go_on" in line
    assert f"{accuracy(tiny, 'sparse'):.4f}" in line
