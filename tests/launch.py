"""Starts a worker module in several gloo processes, the way users start training: one line for a distributed test.

Every launch has a time limit, its own process group, and is killed whole when the limit passes. The worker's output is part of
the failure message.
"""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
MODULES = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "pipelines", "cluster"))
"""What PYTHONPATH needs so that a child process imports this tree."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a CPU process: one thread, no compilation, this tree's modules; nothing of a launcher around us."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    paths = os.pathsep.join(filter(None, (MODULES, os.environ.get("PYTHONPATH"))))
    return {**kept, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": paths, **extra}


def start(processes: int, *arguments: str, **extra: str) -> subprocess.Popen:
    """`python -m arguments...`, under torchrun when `processes` > 1; both output streams are on `.stdout`."""
    command = [sys.executable, "-m", *arguments]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
        command = [sys.executable, "-m", *torchrun, *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(**extra),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher and to every process it started (torchrun gives each rank a session of its own)."""
    try:
        family = [process, *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            os.kill(member.pid, signal.SIGKILL)
    process.wait()


def run(processes: int, *arguments: str, timeout: float = 120, expect: int | None = 0, **extra: str) -> str:
    """Run to the end and return the output; fails with the output when the exit code is not `expect` or time is up."""
    process = start(processes, *arguments, **extra)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        output = process.stdout.read() if process.stdout else ""
        raise AssertionError(f"{arguments} did not end within {timeout} s:\n{output[-4000:]}") from None
    if expect is not None:
        said = f"{arguments} ended with {process.returncode}, not {expect}:\n{output[-6000:]}"
        assert process.returncode == expect, said
    return output
