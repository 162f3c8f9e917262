"""Killed and resumed equals uninterrupted: every figure of every step as hexadecimal floats, and the final weights' sha256.

Runs the real command under torchrun on two processes and kills launcher and ranks with SIGKILL, as a power cut would.
"""

import time
from pathlib import Path

import pytest

from ssa_megatron.train.metrics import read_metrics
from tests import launch

TIMES = (
    "seconds",
    "tokens_per_second",
    "peak_memory",
    "checkpoint_wait",
)  # what may differ: how long it took, and with how much memory


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    """The King James text in rows of 512 tokens, with the demo's tokenizer."""
    import ssa_pipelines

    folder = tmp_path_factory.mktemp("king-james")
    tokenizer = ssa_pipelines.train_tokenizer("package:king-james", folder / "tokenizer.model", vocab_size=2048)
    ssa_pipelines.prepare("package:king-james", tokenizer, folder / "data", row_length=512, validation_fraction=0.05)
    return folder / "data"


def command(run: Path, dataset: Path, *overrides: str) -> list[str]:
    return ["ssa_megatron", "train", "demo", f"data.path={dataset}", *overrides, "--run-folder", str(run)]


def kill_at(step: int, run: Path, arguments: list[str], timeout: float = 240) -> int:
    """Start, SIGKILL everything once `step` is in metrics.jsonl; returns the last step that got there."""
    process = launch.start(2, *arguments)
    deadline = time.monotonic() + timeout
    metrics = run / "metrics.jsonl"
    try:
        while not (metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics))):
            assert process.poll() is None, f"ended before step {step}:\n{process.stdout.read()[-4000:]}"
            assert time.monotonic() < deadline, f"step {step} not reached in {timeout} s"
            time.sleep(0.05)
    finally:
        launch.kill(process)
    return read_metrics(metrics)[-1]["step"]


def figures(run: Path) -> dict[int, dict]:
    """step -> {name: hexadecimal float or value}, without timings; each step must be there once."""
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "steps missing, repeated or out of order"
    exact = {}
    for line in lines:
        kept = {name: value for name, value in line.items() if name not in TIMES}
        exact[line["step"]] = {k: v.hex() if isinstance(v, float) else v for k, v in kept.items()}
    return exact


def final_digest(run: Path) -> str:
    from ssa_megatron.checkpoint.reader import Checkpoint

    return Checkpoint.open(run).digest()


def check(tmp_path: Path, dataset: Path, kills: tuple[int, ...], overrides: tuple[str, ...]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    launch.run(2, *command(whole, dataset, *overrides), timeout=400)
    for step in kills:
        reached = kill_at(step, broken, command(broken, dataset, *overrides))
        assert reached >= step
    output = launch.run(2, *command(broken, dataset, *overrides), timeout=400)
    assert "restored step-" in output
    expected, found = figures(whole), figures(broken)
    assert found.keys() == expected.keys()
    for step in expected:
        assert found[step] == expected[step], f"step {step} differs after the resume"
    assert final_digest(broken) == final_digest(whole)


def test_a_run_killed_twice_continues_bit_for_bit(tmp_path, dataset):
    small = (
        "train.steps=14",
        "checkpoint.interval=4",
        "train.eval_interval=5",
        "train.eval_rows=4",
        "model.num_layers=2",
    )
    check(tmp_path, dataset, kills=(5, 10), overrides=small)


@pytest.mark.slow
def test_the_mode_sequence_after_a_resume_is_that_of_the_whole_run(tmp_path, dataset):
    """Tensor parallel, so that both ranks of a replica must draw alike; the share of sparse trunks is in every line."""
    small = (
        "train.steps=8",
        "checkpoint.interval=3",
        "train.eval_interval=0",
        "model.num_layers=2",
        "parallel.tensor=2",
    )
    check(tmp_path, dataset, kills=(4,), overrides=small)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_and_goes_on_at_another_topology_each_time_is_the_run_of_one_process(tmp_path, dataset):
    """The command, its data position, schedule, evaluations, metrics; test_checkpoint_topology looks at what is stored."""
    small = (
        "train.steps=11",
        "checkpoint.interval=2",
        "train.eval_interval=3",
        "train.eval_rows=4",
        "train.precision=fp32",
    )
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    launch.run(1, *command(whole, dataset, *small), timeout=300)
    for step, topology in {
        3: ("zero.stage=3",),
        5: ("parallel.tensor=2", "parallel.sequence=true"),
        7: ("parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.recompute=full"),
        9: ("parallel.context=2", "zero.stage=2"),
    }.items():
        kill_at(step, moved, command(moved, dataset, *small, *topology))
    launch.run(2, *command(moved, dataset, *small, "parallel.pipeline=2"), timeout=300)
    expected, found = read_metrics(whole / "metrics.jsonl"), read_metrics(moved / "metrics.jsonl")
    assert [line["step"] for line in found] == list(range(1, 12))
    for mine, reference in zip(found, expected, strict=True):
        assert mine.keys() == reference.keys()
        for name in ("lr", "tokens", "counted_tokens", "sparse_share", "applied", "skipped_steps"):
            assert mine[name] == reference[name], name
        for name in reference.keys() & {"loss", "grad_norm", "eval/loss_full", "eval/loss_sparse"}:
            assert mine[name] == pytest.approx(reference[name], rel=1e-5), (mine["step"], name)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_hundred_steps_killed_at_three_steps_equal_the_uninterrupted_run(tmp_path, dataset):
    check(tmp_path, dataset, kills=(37, 95, 163), overrides=())
