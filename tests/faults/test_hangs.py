"""A rank that hangs is named, with its phase; every rank that can leaves its Python stack; and the job ends with exit code 8."""

import os
import re
import signal
import time

import psutil
import pytest

from ssa_megatron.train.heartbeat_file import read
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.restarts import read_starts
from tests.faults.signals import ranks_of, wait_for
from tests.launch import kill, start
from tests.ssa_megatron.conftest import corpus, dataset, tokenizer  # noqa: F401 (fixtures)
from tests.ssa_megatron.support import recipe_file


def hang(tmp_path, dataset, *, stopped: int | None, paused: int | None, **watchdog):  # noqa: F811
    """Have `stopped` get SIGSTOP, or `paused` wait for data: (seconds until a rank is named, the words, all output, the run)."""
    settings = {f"watchdog__{field}": value for field, value in watchdog.items()}
    recipe = recipe_file(tmp_path, dataset, train__steps=100_000, checkpoint__interval=100_000, **settings)
    run, train = tmp_path / "run", ["train", str(recipe), "--run-folder", str(tmp_path / "run")]
    if stopped is not None:
        job = start(2, "ssa_megatron", *train)
    else:
        job = start(2, "tests.workers.paused", "data", "600", str(paused), str(tmp_path), *train)
    try:
        if stopped is not None:
            metrics = run / "metrics.jsonl"
            wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= 3, job)
            ranks = ranks_of(job)
            os.kill(ranks[stopped].pid, signal.SIGSTOP)
        else:
            wait_for((tmp_path / f"data-{paused}").exists, job)
            ranks = ranks_of(job)
        began, named, said = time.monotonic(), None, ""
        while named is None and time.monotonic() - began < 60:
            said += job.stdout.readline()
            named = re.search(r"watchdog: (.*)", said)
        seconds = time.monotonic() - began
        psutil.wait_procs([rank for number, rank in enumerate(ranks) if number != stopped], timeout=60)
        if stopped is not None:
            os.kill(ranks[stopped].pid, signal.SIGKILL)  # as torchrun does, half a minute later
        output = said + job.communicate(timeout=60)[0]
    finally:
        kill(job)
    assert named, output[-3000:]
    return seconds, named[1], output, run


def exit_code(run, rank: int) -> int | None:
    return read(run, rank)["exit"]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_stopped_rank_is_named_within_a_heartbeat_and_five_seconds_and_the_job_ends(tmp_path, dataset, victim):  # noqa: F811
    seconds, named, output, run = hang(tmp_path, dataset, stopped=victim, paused=None, heartbeat=1.0, silence=7.0)
    assert named.startswith(f"rank {victim} (pid "), output[-3000:]
    assert re.search(r"has been silent for \d\.\d s, in \w+ of step \d+, at \S+:\d+ \w+; the job ends in", named)
    assert seconds <= 1.0 + 5.0
    assert exit_code(run, 1 - victim) == 8
    stacks = (run / "logs" / f"stacks-rank-{1 - victim:05d}.txt").read_text()
    assert f"rank {victim} (pid " in stacks
    assert "in _advance\n" in stacks


@pytest.mark.slow
def test_a_rank_that_waits_for_data_for_ever_is_named_and_all_stacks_are_left(tmp_path, dataset):  # noqa: F811
    _, named, output, run = hang(tmp_path, dataset, stopped=None, paused=1, heartbeat=0.5, silence=60.0, stuck=5.0)
    assert re.match(r"no rank has moved for \d s; rank 1 did not arrive: in data of step \d+, 1 wait;", named), output
    assert output.count("did not arrive") == 2  # once as a warning, once as the reason of the end
    assert [exit_code(run, rank) for rank in (0, 1)] == [8, 8]
    assert "in draw_batches" in (run / "logs" / "stacks-rank-00001.txt").read_text()
    assert "in all_reduce_sum" in (run / "logs" / "stacks-rank-00000.txt").read_text()


@pytest.mark.slow
def test_after_a_hang_the_launcher_starts_again_from_the_last_checkpoint_and_the_run_ends_well(tmp_path, dataset):  # noqa: F811
    recipe = recipe_file(tmp_path, dataset, train__steps=400, checkpoint__interval=2, watchdog__silence=7.0)
    run = tmp_path / "run"
    launcher = ["ssa_cluster.launch", "--nproc-per-node", "2", "train", str(recipe), "--run-folder", str(run)]
    job = start(1, *launcher)
    try:
        metrics = run / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(read_metrics(metrics)) >= 5, job)
        os.kill(ranks_of(job)[1].pid, signal.SIGSTOP)
        output, _ = job.communicate(timeout=200)
    finally:
        kill(job)
    assert job.returncode == 0, output[-4000:]
    assert "exit code 8; restarting from the last committed checkpoint" in output
    died, finished = read_starts(run)
    assert (died.ended, finished.ended) == (None, "done")
    assert finished.step >= 2
    assert [line["step"] for line in read_metrics(metrics)] == list(range(1, 401))
