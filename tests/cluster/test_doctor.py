"""`srun ssa doctor --cluster` on a real SLURM of two nodes: one page, the same exit code everywhere."""

import json
import subprocess
import sys

import pytest

from tests import launch

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def doctor(slurm, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [
        "srun",
        "--nodes=2",
        "--ntasks=2",
        sys.executable,
        "-m",
        "ssa_megatron",
        "doctor",
        "--cluster",
        *arguments,
    ]
    return subprocess.run(
        command, cwd=launch.ROOT, env={**slurm.environment, **environment}, capture_output=True, text=True, timeout=400
    )


def test_two_nodes_are_examined_together_and_one_of_them_speaks(slurm):
    done = doctor(slurm, "--json", "--need-gib", "0", MASTER_ADDR="127.0.0.1")
    found = json.loads(done.stdout)
    checks = {finding["check"]: finding for finding in found["findings"]}
    assert checks["rendezvous"]["found"].startswith("2 processes met at 127.0.0.1:")
    assert {"versions", "libraries", "shared memory", "speed", "store", "clocks", "all-reduce"} <= checks.keys()
    assert done.returncode == (7 if found["worst"] == "FAIL" else 0), done.stderr


def test_a_first_node_whose_name_nobody_knows_is_a_fail_that_says_so(slurm):
    done = doctor(slurm, "--timeout", "3")
    assert done.returncode == 7, done.stderr
    assert "did not meet at n1:" in done.stdout
    assert "ssa doctor --host" in done.stdout
