"""Signals: a request is only noted, a second one ends the process, and a run answers with a checkpoint and exit code 75."""

import os
import signal
import subprocess
import sys
import time

import pytest

from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.signals import HANDLED
from tests.launch import environment, kill, start
from tests.ssa_megatron.support import recipe_file

SEVERAL = """
import signal, sys, time
from ssa_megatron.train import signals
signals.ECHO_SECONDS = 1.0
stop = signals.StopRequest().listen()
stop.met()
for name, pause in zip(sys.argv[1::2], sys.argv[2::2]):
    signal.raise_signal(signal.Signals[name])
    print(stop.reason, flush=True)
    time.sleep(float(pause))
"""


def several(*names_and_pauses: str) -> subprocess.CompletedProcess:
    """A process that has met the others and sends itself signals, each followed by a pause in seconds."""
    command = [sys.executable, "-c", SEVERAL, *names_and_pauses]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("name", [number.name for number in HANDLED])
def test_a_signal_is_noted_and_interrupts_nothing(name):
    ended = several(name, "0.1")
    assert (ended.stdout, ended.returncode) == (f"{name}\n", 0)


def test_the_four_signals_of_schedulers_and_people_are_handled():
    assert {number.name for number in HANDLED} == {"SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2"])
def test_torchrun_and_slurm_may_repeat_a_signal_without_cutting_the_checkpoint_short(name):
    """Regression: lost: `scancel --full` signals the batch shell, which forwards to srun, which signals the ranks again."""
    ended = several(name, "0", name, "1.2", name, "0.1")
    assert (ended.stdout, ended.returncode) == (f"{name}\n" * 3, 0)


def test_a_persons_second_sigint_ends_the_process_at_once():
    ended = several("SIGINT", "1.3", "SIGINT", "10", "SIGTERM", "0")
    assert ended.returncode == 130
    assert len(ended.stdout.split()) <= 2  # the second line may be cut short
    assert "second SIGINT" in ended.stderr


def test_one_sigint_delivered_twice_is_one():
    assert several("SIGINT", "0.2", "SIGINT", "0.1").returncode == 0


def test_the_first_of_several_is_the_reason():
    assert several("SIGUSR1", "0", "SIGTERM", "0.1").stdout == "SIGUSR1\nSIGUSR1\n"


def test_a_signal_of_somebody_else_is_not_a_request():
    code = """if 1:
        import signal, time
        from ssa_megatron.train.signals import StopRequest
        stop = StopRequest().listen()
        signal.signal(signal.SIGALRM, lambda *_: print("heard"))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        time.sleep(0.3)
        print(stop.reason)
    """
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=30)
    assert (ended.stdout, ended.returncode) == ("heard\nNone\n", 0)


def test_a_process_that_met_nobody_yet_ends_at_once_even_in_a_call_that_nothing_interrupts():
    code = """if 1:
        import os, signal, threading, time
        from ssa_megatron.train.signals import StopRequest
        stop = StopRequest().listen()
        lock = threading.Lock()
        lock.acquire()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        lock.acquire()
    """
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=30)
    assert ended.returncode == 75
    assert "nothing to save; run the same command again" in ended.stderr


def test_only_a_wait_that_says_so_is_interrupted_also_by_the_request_of_another_thread():
    code = """if 1:
        import threading, time
        from ssa_megatron.train.signals import StopAsked, StopRequest
        stop = StopRequest().listen()
        stop.met()
        began = time.monotonic()
        threading.Timer(0.2, stop.ask, ("SIGTERM of rank 3",)).start()
        time.sleep(0.5)
        print(time.monotonic() - began >= 0.5)
        for _ in range(2):
            try:
                with stop.interruptible():
                    time.sleep(60)
            except StopAsked as asked:
                print(asked)
        stop = StopRequest().listen()
        stop.met()
        threading.Timer(0.2, stop.ask, ("the second",)).start()
        try:
            with stop.interruptible():
                try:
                    threading.Event().wait(60)
                except Exception:
                    print("code that retries saw it")
        except StopAsked as asked:
            print(asked)
    """
    ended = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=30)
    assert ended.stdout.splitlines() == ["True", "SIGTERM of rank 3", "SIGTERM of rank 3", "the second"], ended.stderr


def test_sigterm_during_training_ends_with_a_committed_checkpoint_of_the_last_step_and_exit_code_75(dataset, tmp_path):
    """Regression: lost: the argument parser returned 75, the process ended with 0, and no scheduler started the job again."""
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
