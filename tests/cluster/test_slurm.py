"""The shipped templates on a real SLURM of two nodes: every way a job is stopped, and that it goes on as if it had not been."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.restarts import read_starts
from tests.cluster.conftest import SMALL, submit
from tests.cluster.mini_slurm import MiniSlurm
from tests.ssa_megatron.test_resume import figures, final_digest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Job:
    """A run submitted with the template for several nodes."""

    def __init__(self, slurm: MiniSlurm, site: Path, run: Path, data: Path, *arguments: str, nodes: str = "2"):
        self.slurm, self.run = slurm, run
        said = submit(
            *("--site", site, "--nodes", nodes, "--run-folder", run, *arguments, "demo", *SMALL, f"data.path={data}"),
            environment=slurm.environment,
        )
        [line] = [line for line in said.splitlines() if line.startswith("job  ")]
        self.id = line.split()[1]

    @property
    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted((self.run / "logs").glob("*.log")))

    def reach(self, step: int, timeout: float = 120) -> None:
        deadline = time.monotonic() + timeout
        metrics = self.run / "metrics.jsonl"
        while not (metrics.exists() and any(line["step"] >= step for line in read_metrics(metrics))):
            assert time.monotonic() < deadline, f"step {step} not within {timeout} s\n{self.log}\n{self.slurm.logs()}"
            time.sleep(0.1)

    def again(self, restarts: int, timeout: float = 60) -> None:
        """Wait for the requeue, and let it start now: SLURM otherwise holds a requeued job back for two minutes."""
        deadline = time.monotonic() + timeout
        while int((found := self.slurm.job(self.id))["Restarts"]) < restarts or "COMPLETING" in found["JobState"]:
            assert time.monotonic() < deadline, f"{found}\n{self.log}"
            time.sleep(0.3)
        if found["JobState"] == "PENDING":
            time.sleep(3)  # credentials of the earlier life are revoked by the second
            self.slurm.command("scontrol", "update", f"JobId={self.id}", "StartTime=now")

    def end(self, state: str = "COMPLETED", timeout: float = 200) -> None:
        done = self.slurm.wait(self.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=timeout)
        assert done["JobState"] == state, f"{done}\n{self.log}"


@pytest.fixture
def job(slurm, site, tmp_path, data):
    job = Job(slurm, site, tmp_path / "run", data)
    yield job
    slurm.command("scancel", job.id)
    slurm.wait(job.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=60)


def check_equal(run: Path, whole: Path) -> None:
    """Each step once, every figure the same bits, and so are the final weights and moments."""
    assert figures(run) == figures(whole)
    assert final_digest(run) == final_digest(whole)


def test_a_job_on_two_nodes_trains_to_its_end(job, whole):
    job.end()
    check_equal(job.run, whole)
    assert "node 0" in job.log
    assert "node 1" in job.log
    assert "2 process(es) on cpu, data 2" in job.log
    [start] = read_starts(job.run)
    assert (start.world, start.job, start.ended) == (2, job.id, "done")


def test_a_signal_to_the_batch_shell_saves_requeues_and_continues(job, whole):
    """What `--signal=B:USR1` does before a time limit, at a step of our choice."""
    job.reach(13)
    job.slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    job.again(1)
    job.end()
    first, second = read_starts(job.run)
    assert first.ended == "stopped by a signal"
    assert second.step == first.reached >= 13  # not a step was lost
    assert "job: requeued, to go on from step-" in job.log
    check_equal(job.run, whole)


def test_scancel_with_a_signal_to_the_ranks_does_the_same(job, whole):
    """It reaches launchers and ranks at once, on both nodes, and the launchers forward it: still one request."""
    job.reach(8)
    job.slurm.command("scancel", "--signal=TERM", job.id)
    job.again(1)
    job.end()
    assert read_starts(job.run)[0].ended == "stopped by a signal"
    check_equal(job.run, whole)


def test_scancel_to_everything_at_once_is_one_request(job, whole):
    """Batch shell, srun's tasks and ranks all get USR1, and the ranks get it again through srun."""
    job.reach(8)
    job.slurm.command("scancel", "--full", "--signal=USR1", job.id)
    job.again(1)
    job.end()
    assert read_starts(job.run)[0].ended == "stopped by a signal"
    check_equal(job.run, whole)


def test_scontrol_requeue_continues_from_the_last_checkpoint(job, whole):
    job.reach(14)
    job.slurm.command("scontrol", "requeue", job.id)
    job.again(1)
    job.end()
    assert read_starts(job.run)[1].step >= 10
    check_equal(job.run, whole)


def test_a_killed_step_daemon_on_one_node_requeues_the_job(job, whole):
    """As when a node dies: its slurmstepd, launcher and rank are gone without a word."""
    job.reach(14)
    ranks = [p for p in psutil.process_iter() if "--run-folder" in p.cmdline() and "ssa_megatron" in p.cmdline()]
    [second] = [p for p in ranks if p.environ().get("SLURMD_NODENAME") == "n2" and str(job.run) in p.cmdline()]
    for process in (*reversed(second.parents()[:2]), second):  # launcher, slurmstepd
        assert process.name().startswith(("python", "slurmstepd")), process
        os.kill(process.pid, signal.SIGKILL)
    job.again(1, timeout=150)
    job.end()
    assert read_starts(job.run)[0].ended is None
    assert read_starts(job.run)[1].step >= 10
    check_equal(job.run, whole)


def test_a_killed_rank_restarts_within_the_job(job, whole):
    job.reach(14)
    ranks = [p for p in psutil.process_iter() if str(job.run) in p.cmdline() and "ssa_megatron" in p.cmdline()]
    os.kill(ranks[0].pid, signal.SIGKILL)
    job.end()
    assert job.slurm.job(job.id)["Restarts"] == "0"
    assert "killed by SIGKILL; restarting from the last committed checkpoint" in job.log
    assert [start.step >= 10 for start in read_starts(job.run)] == [False, True]
    check_equal(job.run, whole)


def test_a_second_signal_ends_the_job_at_once_and_does_not_requeue_it(job):
    job.reach(3)
    for pid in [p.pid for p in psutil.process_iter() if str(job.run) in p.cmdline() and "ssa_megatron" in p.cmdline()]:
        os.kill(pid, signal.SIGSTOP)  # ranks that cannot stop in an orderly way
    job.slurm.command("scancel", "--batch", "--signal=TERM", job.id)
    time.sleep(6)
    job.slurm.command("scancel", "--batch", "--signal=TERM", job.id)
    job.end("FAILED", timeout=30)
    assert "again: the ranks are killed" in job.log
    assert "not requeued" in job.log
    assert job.slurm.job(job.id)["Restarts"] == "0"


def test_scancel_ends_the_job_with_a_committed_checkpoint_and_it_stays_ended(job):
    job.reach(3)
    job.slurm.command("scancel", job.id)
    job.end("CANCELLED", timeout=60)
    time.sleep(3)
    assert job.slurm.job(job.id)["JobState"] == "CANCELLED"
    assert read_starts(job.run)[0].ended == "stopped by a signal"
