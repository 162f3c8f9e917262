"""The shipped templates on a real SLURM of two nodes: every way a job is stopped, and that it goes on as if it had not been."""

import time
from pathlib import Path

import psutil
import pytest
import yaml

from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.restarts import read_starts
from ssa_megatron.train.run_folder import read_recipe
from tests.cluster.conftest import SMALL, submit
from tests.cluster.mini_slurm import MiniSlurm
from tests.ssa_megatron.test_resume import figures, final_digest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


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
    assert first.ended.startswith("stopped by ")
    assert second.step == first.reached >= 13  # not a step was lost
    assert "job: requeued, to go on from step-" in job.log
    check_equal(job.run, whole)


def ranks(run: Path, node: str | None = None) -> list[psutil.Process]:
    """The processes that train in `run`, on one node or on all."""
    asked = psutil.process_iter(["cmdline", "environ"])  # None for a process that has ended meanwhile
    found = [p for p in asked if {"ssa_megatron", str(run)} <= set(p.info["cmdline"] or ())]
    return [p for p in found if node is None or (p.info["environ"] or {}).get("SLURMD_NODENAME") == node]


def kill_node(run: Path, node: str) -> None:
    """Rank, launcher and slurmstepd of a node are gone without a word."""
    [rank] = ranks(run, node)
    family = (*reversed(rank.parents()[:2]), rank)
    assert [process.name()[:6] for process in family] == ["slurms", "python", "python"]
    for process in family:
        process.kill()


def test_the_time_limit_is_announced_saved_for_and_outlived(slurm, site, tmp_path, data, whole):
    """Four minutes; 10 s of grace and SLURM's minute before that. The ranks pause, so that the limit comes before their end."""
    hurried = tmp_path / "site.yaml"
    hurried.write_text(yaml.safe_dump(yaml.safe_load(site.read_text()) | {"grace": 10}))
    job = Job(slurm, hurried, tmp_path / "run", data, "--time", "4")
    job.reach(5)
    paused = ranks(job.run)
    for process in paused:
        process.suspend()
    deadline = time.monotonic() + 240
    while "job: USR1" not in job.log:
        assert time.monotonic() < deadline, job.log
        time.sleep(0.2)
    for process in paused:
        process.resume()
    job.again(1)
    job.end()
    first, second = read_starts(job.run)
    assert first.ended.startswith("stopped by ")
    assert second.ended == "done"
    check_equal(job.run, whole)


def test_a_job_whose_node_died_goes_on_with_the_node_that_is_left(slurm, site, tmp_path, data, whole):
    job = Job(slurm, site, tmp_path / "run", data, nodes="1-2")
    job.reach(14)
    kill_node(job.run, "n2")
    for state in ("DOWN", "DRAIN"):  # SLURM learns of it; drained, it does not come back by itself
        slurm.command("scontrol", "update", "NodeName=n2", f"State={state}", "Reason=test")
    try:
        job.again(1)
        job.end()
    finally:
        slurm.command("scontrol", "update", "NodeName=n2", "State=RESUME")
    first, second = read_starts(job.run)
    assert (first.world, first.ended, second.world, second.ended) == (2, None, 1, "done")
    lines, expected = read_metrics(job.run / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5), line["step"]


def test_an_array_trains_a_run_for_each_line_of_the_sweep(slurm, site, tmp_path, data):
    sweep, run = tmp_path / "sweep.txt", tmp_path / "runs"
    sweep.write_text("# two rates\noptimizer.lr=0.001\noptimizer.lr=0.002 train.seed=7\n")
    said = submit(
        *("--site", site, "--sweep", sweep, "--run-folder", run, "demo", *SMALL, "train.steps=4", f"data.path={data}"),
        environment=slurm.environment,
    )
    job = next(line.split()[1] for line in said.splitlines() if line.startswith("job  "))
    for task in ("0", "1"):
        done = slurm.wait(f"{job}_{task}", "COMPLETED", "FAILED", "CANCELLED", timeout=400)
        assert done["JobState"] == "COMPLETED", (run / "logs" / f"{job}_{task}.log").read_text()
        assert [line["step"] for line in read_metrics(run / task / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [read_recipe(run / task).optimizer.lr for task in ("0", "1")] == [0.001, 0.002]
    assert [read_recipe(run / task).train.seed for task in ("0", "1")] == [1234, 7]


def test_a_signal_before_any_rank_runs_is_answered_too(job, whole):
    deadline = time.monotonic() + 200
    while "launch: node 0" not in job.log:  # before its batch script runs, SLURM itself loses the signal
        assert time.monotonic() < deadline, job.log
        time.sleep(0.05)
    job.slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    job.again(1)
    assert read_starts(job.run) == []
    job.end()
    check_equal(job.run, whole)


def test_scancel_with_a_signal_to_the_ranks_does_the_same(job, whole):
    """It reaches launchers and ranks at once, on both nodes, and the launchers forward it: still one request."""
    job.reach(8)
    job.slurm.command("scancel", "--signal=TERM", job.id)
    job.again(1)
    job.end()
    assert read_starts(job.run)[0].ended.startswith("stopped by ")
    check_equal(job.run, whole)


def test_scancel_to_everything_at_once_is_one_request(job, whole):
    """Batch shell, srun's tasks and ranks all get USR1, and the ranks get it again through srun."""
    job.reach(8)
    job.slurm.command("scancel", "--full", "--signal=USR1", job.id)
    job.again(1)
    job.end()
    assert read_starts(job.run)[0].ended.startswith("stopped by ")
    check_equal(job.run, whole)


def test_scontrol_requeue_continues_from_the_last_checkpoint(job, whole):
    job.reach(14)
    job.slurm.command("scontrol", "requeue", job.id)
    job.again(1)
    job.end()
    assert read_starts(job.run)[1].step >= 10
    check_equal(job.run, whole)


def test_a_killed_step_daemon_on_one_node_requeues_the_job(job, whole):
    job.reach(14)
    kill_node(job.run, "n2")
    job.again(1, timeout=400)
    job.end()
    assert read_starts(job.run)[0].ended is None
    assert read_starts(job.run)[1].step >= 10
    check_equal(job.run, whole)


def test_a_killed_rank_restarts_within_the_job(job, whole):
    job.reach(14)
    ranks(job.run, "n2")[0].kill()
    job.end()
    assert job.slurm.job(job.id)["Restarts"] == "0"
    assert "killed by SIGKILL; restarting from the last committed checkpoint" in job.log
    assert [start.step >= 10 for start in read_starts(job.run)] == [False, True]
    check_equal(job.run, whole)


def test_a_second_signal_ends_the_job_at_once_and_does_not_requeue_it(job):
    job.reach(3)
    for process in ranks(job.run):
        process.suspend()  # it cannot stop in an orderly way
    job.slurm.command("scancel", "--batch", "--signal=TERM", job.id)
    time.sleep(6)
    job.slurm.command("scancel", "--batch", "--signal=TERM", job.id)
    job.end("FAILED", timeout=30)
    assert "again: the ranks are killed" in job.log
    assert "the same signal came twice, so not requeued" in job.log
    assert job.slurm.job(job.id)["Restarts"] == "0"


def test_scancel_ends_the_job_with_a_committed_checkpoint_and_it_stays_ended(job):
    job.reach(3)
    job.slurm.command("scancel", job.id)
    job.end("CANCELLED", timeout=60)
    time.sleep(3)
    assert job.slurm.job(job.id)["JobState"] == "CANCELLED"
    assert read_starts(job.run)[0].ended.startswith("stopped by ")
