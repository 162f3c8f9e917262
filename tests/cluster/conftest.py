"""A real SLURM, a small corpus, and an uninterrupted run to compare with; made once for all tests here."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import launch
from tests.cluster.mini_slurm import MiniSlurm, why_not

SMALL = ("model.num_layers=2", "train.steps=40", "checkpoint.interval=10", "train.eval_interval=0")


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """Two nodes, n1 and n2; skipped, with the reason, where it cannot be."""
    if reason := why_not():
        pytest.skip(f"NO SLURM TEST RAN: {reason}")
    with MiniSlurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """The King James text in rows of 512 tokens, with the demo's tokenizer."""
    import ssa_pipelines

    folder = tmp_path_factory.mktemp("king-james")
    tokenizer = ssa_pipelines.train_tokenizer("package:king-james", folder / "tokenizer.model", vocab_size=2048)
    ssa_pipelines.prepare("package:king-james", tokenizer, folder / "data", row_length=512, validation_fraction=0.05)
    return folder / "data"


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> Path:
    """A run of SMALL on two processes that nothing interrupts."""
    run = tmp_path_factory.mktemp("whole") / "run"
    launch.run(2, "ssa_megatron", "train", "demo", *SMALL, f"data.path={data}", "--run-folder", str(run), timeout=600)
    return run


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """cluster/site.yaml for two nodes without GPUs, one rank each."""
    values = yaml.safe_load((launch.ROOT / "cluster" / "site.yaml").read_text())
    values |= {"python": sys.executable, "gpus_per_node": 0, "ranks_per_node": 1, "cpus_per_node": 1}
    values |= {"network": "ethernet", "grace": 40, "join": 90, "time": "0:10:00"}
    path = tmp_path_factory.mktemp("site") / "site.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def submit(*arguments: str, environment: dict | None = None, expect: int = 0) -> str:
    """cluster/submit, as a user calls it; its output."""
    done = subprocess.run(
        [str(launch.ROOT / "cluster" / "submit"), *map(str, arguments)],
        env={**(environment or launch.environment()), "PYTHON": sys.executable},
        cwd=os.path.dirname(launch.ROOT),  # it works from anywhere
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr
