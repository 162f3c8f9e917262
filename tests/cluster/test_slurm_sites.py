"""What else a site does to jobs, on a real SLURM: one node, sweeps, a second job in the same run folder, preemption."""

import pytest
import yaml

from ssa_megatron.status.status_command import find
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.restarts import read_starts
from ssa_megatron.train.run_folder import read_recipe
from tests.cluster.conftest import submit
from tests.cluster.jobs import RECIPE, Job, check_equal, number, ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_a_job_on_one_node_saves_requeues_and_continues(slurm, site, tmp_path, data, whole):
    """The template for one node, with two ranks there."""
    two = tmp_path / "site.yaml"
    two.write_text(yaml.safe_dump(yaml.safe_load(site.read_text()) | {"ranks_per_node": 2, "cpus_per_node": 2}))
    job = Job.submit(slurm, two, tmp_path / "run", data, nodes="1")
    assert (job.run / "jobs" / "single.sbatch").exists()
    job.reach(13)
    slurm.command("scancel", "--batch", "--signal=USR1", job.id)
    job.again(1)
    job.end()
    first, second = read_starts(job.run)
    assert first.ended.startswith("stopped by ")
    assert (second.step, second.ended) == (first.reached, "done")
    check_equal(job.run, whole)


def test_an_array_trains_a_run_for_each_line_of_the_sweep_and_a_task_requeues_itself_alone(slurm, site, tmp_path, data):
    sweep, run = tmp_path / "sweep.txt", tmp_path / "runs" / "sweep"
    sweep.write_text("# two rates\noptimizer.lr=0.001\noptimizer.lr=0.002 train.seed=7\n")
    options = ("--site", site, "--sweep", sweep, "--run-folder", run)
    array = number(submit(*options, *RECIPE, f"data.path={data}", environment=slurm.environment))
    tasks = [Job(slurm, f"{array}_{task}", run / str(task), run / "logs") for task in range(2)]
    tasks[1].reach(5)
    slurm.command("scancel", "--batch", "--signal=USR1", tasks[1].id)
    tasks[1].again(1)
    for task in tasks:
        task.end()
        assert [line["step"] for line in read_metrics(task.run / "metrics.jsonl")] == list(range(1, 41))
    assert [[start.job for start in read_starts(task.run)] for task in tasks] == [
        [f"{array}_0"],
        [f"{array}_1", f"{array}_1"],
    ]
    assert find([array], tmp_path / "runs") == [run / "0", run / "1"]
    assert [read_recipe(task.run).optimizer.lr for task in tasks] == [0.001, 0.002]
    assert [read_recipe(task.run).train.seed for task in tasks] == [1234, 7]


def test_a_second_job_in_the_same_run_folder_ends_with_a_message_and_disturbs_nothing(
    slurm, site, tmp_path, data, whole
):
    first = Job.submit(slurm, site, tmp_path / "run", data)
    first.reach(2)
    paused = ranks(first.run)
    for process in paused:  # it keeps the folder, and is not done before the other has loaded its libraries
        process.suspend()
    second = Job.submit(slurm, site, tmp_path / "run", data)
    second.end("FAILED")
    for process in paused:
        process.resume()
    found = slurm.job(second.id)
    assert (found["ExitCode"], found["Restarts"]) == ("5:0", "0")
    said = (first.run / "logs" / f"{second.id}.log").read_text()
    assert "is in use by process" in said
    assert f"in SLURM job {first.id}" in said
    first.end()
    check_equal(first.run, whole)


def test_a_preempted_job_saves_within_the_grace_time_requeues_and_continues(slurm, site, tmp_path, data, whole):
    """PreemptMode=REQUEUE with a GraceTime: SLURM sends TERM, and would kill a minute later."""
    job = Job.submit(slurm, site, tmp_path / "run", data)
    job.reach(13)
    everything = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.log")
    urgent = slurm.command("sbatch", "--parsable", *everything, "--wrap=sleep 3").strip()
    slurm.wait(urgent, "COMPLETED", timeout=120)
    job.again(1)
    job.end()
    first, second = read_starts(job.run)
    assert first.ended.startswith("stopped by ")
    assert second.step == first.reached >= 13
    check_equal(job.run, whole)
