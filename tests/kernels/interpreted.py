"""A test file that runs itself again under Triton's interpreter, which must be chosen before triton is imported."""

import os
import subprocess
import sys

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"


def run_again(file: str) -> None:
    """Every test of `file`, in a process of its own with the interpreter; fails with its output."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
