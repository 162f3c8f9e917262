"""The template for several nodes on a real SLURM: every way a job is stopped, and that it goes on as if it had not been."""

import time
from pathlib import Path

import pytest
import yaml

from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.restarts import read_starts
from tests.cluster.jobs import Job, check_equal, ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture
def job(slurm, site, tmp_path, data):
    job = Job.submit(slurm, site, tmp_path / "run", data)
    yield job
    slurm.command("scancel", job.id)
    slurm.wait(job.id, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout=60)


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
    job = Job.submit(slurm, hurried, tmp_path / "run", data, "--time", "4")
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
    job = Job.submit(slurm, site, tmp_path / "run", data, nodes="1-2")
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


@pytest.mark.parametrize("node", ["n2", "n1"])
def test_a_killed_step_daemon_on_one_node_requeues_the_job(job, whole, node):
    """n1 holds the rendezvous: the other launcher waits in vain for it, which was once exit code 7 and the end of the job."""
    job.reach(14)
    kill_node(job.run, node)
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
