"""Signals: a request is only noted, a second one ends the process, and a run answers with a checkpoint and exit code 75."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.signals import HANDLED, StopRequest
from tests.launch import environment, kill, start
from tests.ssa_megatron.support import recipe_file

TWICE = """
import signal, sys, time
from ssa_megatron.train.signals import ECHO_SECONDS, StopRequest
stop = StopRequest().listen()
for name in sys.argv[1:]:
    if name == "later":
        time.sleep(ECHO_SECONDS + 0.1)
        continue
    signal.raise_signal(signal.Signals[name])
    print(stop.received.name, flush=True)
"""


@pytest.fixture
def handlers():
    """Whatever a test listens to, the handlers of this process come back."""
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def twice(*names: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", TWICE, *names]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_is_noted_and_interrupts_nothing(handlers, number):
    stop = StopRequest()
    assert stop.listen() is stop
    assert stop.received is None
    os.kill(os.getpid(), number)
    assert stop.received == number


def test_the_four_signals_of_schedulers_and_people_are_handled():
    assert {number.name for number in HANDLED} == {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_second_signal_of_the_same_kind_ends_the_process_at_once(name):
    ended = twice(name, "later", name, name)
    assert ended.stdout == f"{name}\n"
    assert ended.returncode == -signal.Signals[name]


def test_the_same_request_heard_twice_within_seconds_is_one_request():
    """Once lost: `scancel --full` signals the batch shell, which forwards to srun, which signals ranks that had it already."""
    ended = twice("SIGUSR1", "SIGUSR1", "SIGUSR1")
    assert ended.stdout == "SIGUSR1\n" * 3
    assert ended.returncode == 0


def test_a_second_signal_of_another_kind_is_noted_too():
    ended = twice("SIGUSR1", "SIGTERM")
    assert ended.stdout == "SIGUSR1\nSIGTERM\n"
    assert ended.returncode == 0


def test_sigterm_during_training_ends_with_a_committed_checkpoint_of_the_last_step_and_exit_code_75(dataset, tmp_path):
    """Once lost: the argument parser returned 75, the process ended with 0, and no scheduler started the job again."""
    recipe = recipe_file(tmp_path, dataset, train__steps=100_000, checkpoint__interval=100_000)
    run = tmp_path / "run"
    process = start(1, "ssa_megatron", "train", str(recipe), "--run-folder", str(run))
    try:
        deadline = time.monotonic() + 90
        while not (run / "metrics.jsonl").is_file() or len(read_metrics(run / "metrics.jsonl")) < 2:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline, "no second step within 90 s"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        kill(process)
    assert process.returncode == 75, output
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert Checkpoint.open(run).content.step == steps[-1]
    assert f"stopped by SIGTERM at step {steps[-1]}" in output
