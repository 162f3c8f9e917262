"""A training job on the mini SLURM: how far it is, and how it ended."""

import time
from pathlib import Path

import psutil

from ssa_megatron.train.metrics import read_metrics
from tests.cluster.conftest import SMALL, submit
from tests.cluster.mini_slurm import MiniSlurm
from tests.ssa_megatron.train.test_resume import figures, final_digest

RECIPE = ("demo", *SMALL)


class Job:
    """A job that trains in `run`; of an array, one task, whose logs are in `logs`."""

    def __init__(self, slurm: MiniSlurm, job: str, run: Path, logs: Path | None = None):
        self.slurm, self.id, self.run, self._logs = slurm, job, run, logs or run / "logs"

    @classmethod
    def submit(cls, slurm: MiniSlurm, site: Path, run: Path, data: Path, *arguments: str, nodes: str = "2") -> "Job":
        """By cluster/submit, with the demo recipe made SMALL."""
        options = ("--site", site, "--nodes", nodes, "--run-folder", run, *arguments)
        return cls(slurm, number(submit(*options, *RECIPE, f"data.path={data}", environment=slurm.environment)), run)

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._logs.glob("*.log")))

    def reach(self, step: int, timeout: float = 400) -> None:
        deadline = time.monotonic() + timeout
        metrics = self.run / "metrics.jsonl"
        while not (metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics))):
            assert time.monotonic() < deadline, f"step {step} not within {timeout} s\n{self.log}\n{self.slurm.logs()}"
            time.sleep(0.1)

    def again(self, restarts: int, timeout: float = 200) -> None:
        """Wait for the requeue, and let it start now: SLURM otherwise holds a requeued job back for two minutes."""
        deadline = time.monotonic() + timeout
        while int((found := self.slurm.job(self.id))["Restarts"]) < restarts or "COMPLETING" in found["JobState"]:
            assert time.monotonic() < deadline, f"{found}\n{self.log}"
            time.sleep(0.3)
        if found["JobState"] == "PENDING":
            time.sleep(3)  # credentials of the earlier life are revoked by the second
            self.slurm.command("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def end(self, state: str = "COMPLETED", timeout: float = 400) -> None:
        done = self.slurm.wait(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=timeout)
        assert done["JobState"] == state, f"{done}\n{self.log}"


def number(said: str) -> str:
    """The job number in what cluster/submit said."""
    [line] = [line for line in said.splitlines() if line.startswith("job  ")]
    return line.split()[1]


def check_equal(run: Path, whole: Path) -> None:
    """Each step once, every figure the same bits, and so are the final weights and moments."""
    assert figures(run) == figures(whole)
    assert final_digest(run) == final_digest(whole)


def ranks(run: Path, node: str | None = None) -> list[psutil.Process]:
    """The processes that train in `run`, on one node or on all."""
    asked = psutil.process_iter(["cmdline", "environ"])  # None for a process that has ended meanwhile
    found = [p for p in asked if {"ssa_megatron", str(run)} <= set(p.info["cmdline"] or ())]
    return [p for p in found if node is None or (p.info["environ"] or {}).get("SLURMD_NODENAME") == node]
