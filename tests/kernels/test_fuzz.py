"""The fuzzer without a GPU: a few tiny cases under Triton's interpreter pass, and a kernel that is wrong does not.

It runs in processes of its own, because the interpreter must be chosen before triton is imported.
"""

import os
import subprocess
import sys

BROKEN = """
import sys
from ssa_kernels.triton import sparse as triton_sparse
right = triton_sparse.forward
def wrong(*arguments, **options):
    o, lse = right(*arguments, **options)
    o.view(-1)[-1] += 0.01
    return o, lse
triton_sparse.forward = wrong
from tests.gpu import fuzz
sys.exit(fuzz.main())
"""


def run(program: list[str], *options: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", *program, "--tiny", "--workers", "0", *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)


def test_tiny_cases_pass():
    done = run(["-m", "tests.gpu.fuzz"], "--cases", "5", "--configurations", "5", "--seed", "1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "5 cases, 0 failed" in done.stdout


def test_a_wrong_element_fails_and_names_the_case():
    done = run(["-c", BROKEN], "--only", "3:0", "--seed", "1")
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    assert "FAILED --seed 1 --only 3:0: sparse output 0: norm" in done.stdout
