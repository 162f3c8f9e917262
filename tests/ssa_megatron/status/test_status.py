"""`ssa status` and `ssa profile`: what a run folder tells, what it does not, and a profile of a job that is running."""

import json
import os
import re
import time
from pathlib import Path

import pytest

from ssa_megatron.config import dump_recipe
from ssa_megatron.errors import ConfigError, RunFolderError
from ssa_megatron.planning.hardware import TABLE
from ssa_megatron.planning.step_time import flops_per_token
from ssa_megatron.status.state import Watcher, duration
from ssa_megatron.status.status_command import ask_for_profile, every_rank, find, row, status
from ssa_megatron.train import heartbeat_file, profile_request, prometheus
from ssa_megatron.train.heartbeat import Heartbeat
from ssa_megatron.train.restarts import Attempt, read_starts
from tests.errors import raises
from tests.faults.signals import wait_for
from tests.launch import kill, start
from tests.ssa_megatron.support import recipe_file, tiny


def stamp(seconds_ago: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(time.time() - seconds_ago))


def begin(run: Path, *, step: int = 0, ago: float, world: int = 2, job: str | None = None) -> str:
    about = {
        "event": "start",
        "step": step,
        "world": world,
        "time": stamp(ago),
        "host": "n1",
        "job": job,
        "found": step,
    }
    return json.dumps(about) + "\n"


def sign(
    rank: int, *, ago: float = 0.5, phase: str = "compute", exit_code: int | None = None, seconds: float = 0.1
) -> dict:
    return {
        "start": "1",
        "rank": rank,
        "host": "n1",
        "pid": 100 + rank,
        "time": time.time() - ago,
        "beat": 3,
        "step": 11,
        "fresh": False,
        "phase": phase,
        "marks": 9,
        "seconds": seconds,
        "at": "train/step.py:70 train_step",
        "waits": False,
        "stop": None,
        "verdict": None,
        "exit": exit_code,
    }


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of 20 steps at step 10, half a second each, begun ten seconds ago, once killed."""
    folder = tmp_path / "runs" / "first"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_recipe(tiny(train__steps=20)))
    lines = [{"step": step, "loss": 3.0 - step / 10, "seconds": 0.5} for step in range(1, 11)]
    lines[4]["eval/loss_full"] = 2.75
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "starts.jsonl").write_text(begin(folder, ago=10) + begin(folder, step=4, ago=4, job="4711"))
    (folder / "checkpoints" / "step-00000008").mkdir(parents=True)
    (folder / "checkpoints" / ".tmp-step-00000010").mkdir()
    heartbeat_file.clear(folder)
    return folder


def test_a_running_job_shows_step_loss_speed_goodput_time_left_checkpoint_and_restarts(run):
    for rank in (0, 1):
        assert heartbeat_file.write(run, sign(rank))
    found = Watcher(run).look()
    assert (found.state, found.alive, found.step, found.steps) == ("compute", True, 10, 20)
    assert (found.loss, found.evaluation) == (2.0, 2.75)
    assert found.tokens_per_second == 4 * 33 / 0.5
    assert found.seconds_left == 5.0
    assert found.goodput == pytest.approx(0.5, abs=0.05)  # ten steps of half a second in ten seconds
    assert (found.checkpoint, found.restarts, found.died, found.world, found.job) == (8, 1, 1, 2, "4711")
    assert found.mfu is None  # on a CPU
    assert "1, 1 died" in row(found)


def test_a_clock_that_is_behind_and_a_checkpoint_pruned_meanwhile_show_no_nonsense(run, monkeypatch):
    """Regression: `8, -3600 s ago`, and a traceback."""
    newest = run / "checkpoints" / "step-00000008"
    os.utime(newest, (time.time() + 3600,) * 2)
    assert Watcher(run).look().checkpoint_age == 0
    monkeypatch.setattr("ssa_megatron.status.state.committed", lambda _: [newest.with_name("step-00000007")])
    found = Watcher(run).look()
    assert (found.checkpoint, found.checkpoint_age) == (7, None)
    assert row(found)[9] == "7"


def test_the_share_of_the_gpus_peak_is_that_of_the_plan(run):
    (run / "environment.json").write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3"}))
    found = Watcher(run).look()
    expected = found.tokens_per_second * flops_per_token(tiny(train__steps=20)) / (2 * TABLE["h100"].peak_flops)
    assert found.mfu == pytest.approx(expected)


@pytest.mark.parametrize(
    ("signs", "state", "alive"),
    [
        ([], "no sign of life", False),
        ([{"rank": 0, "exit_code": 0}, {"rank": 1, "exit_code": 0}], "done", False),
        ([{"rank": 0, "exit_code": 75}, {"rank": 1, "exit_code": 75}], "stopped; start it again", False),
        ([{"rank": 0, "exit_code": 8}, {"rank": 1, "ago": 60}], "hung, see logs/; start it again", False),
        ([{"rank": 0, "exit_code": 3}, {"rank": 1, "exit_code": 3}], "ended with exit code 3", False),
        ([{"rank": 0, "ago": 600}, {"rank": 1, "ago": 602}], "no sign of life for 10 min", False),
        ([{"rank": 0}, {"rank": 1, "ago": 39.6}], "rank 1 silent for 40 s", True),
        ([{"rank": 0, "phase": "save", "seconds": 200}, {"rank": 1}], "save for 3 min", True),
    ],
)
def test_the_state_is_told_by_the_signs_of_life(run, signs, state, alive):
    for one in signs:
        heartbeat_file.write(run, sign(**one))
    found = Watcher(run).look()
    assert (found.state, found.alive) == (state, alive)
    assert (found.seconds_left is not None) == alive


def test_a_second_look_reads_what_is_new_and_a_resume_that_rewrote_the_file(run):
    watcher = Watcher(run)
    assert watcher.look().step == 10
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 11, "loss": 1.5, "seconds": 0.5}) + '\n{"step": 12, "lo')
    assert watcher.look().step == 11
    kept = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:8]
    (run / "anew").write_text("".join(kept))
    os.replace(run / "anew", run / "metrics.jsonl")
    assert watcher.look().step == 8
    assert watcher._productive == 4.0


def test_a_run_that_has_not_made_a_step_is_shown(run):
    for name in ("metrics.jsonl", "starts.jsonl"):
        (run / name).unlink()
    heartbeat_file.write(run, sign(0, phase="restore"))
    found = Watcher(run).look()
    assert (found.state, found.step, found.loss, found.goodput, found.world) == ("restore", 0, None, None, None)
    assert row(found)[3:9] == ("-",) * 6


def test_runs_are_found_by_folder_by_job_number_and_all_of_them(run):
    assert find([], run.parent) == find(["4711"], run.parent) == find([str(run)], run.parent) == [run]
    with raises(RunFolderError, "no-run-of-job", 4712):
        find(["4712"], run.parent)
    with raises(RunFolderError, "no-run-folder", run):
        find([], run)
    with raises(RunFolderError, "status-not-a-run-folder", run.parent):
        Watcher(run.parent)


def test_a_run_that_cannot_be_read_hides_no_other(run, capsys):
    other = run.parent / "second"
    other.mkdir()
    (other / "config.yaml").write_text("name: second\nwhat: is this\n")
    status([], runs=run.parent, watch=None, as_json=False, ranks=False)
    shown = capsys.readouterr().out
    assert f"{run} " in shown
    assert f"{other} cannot be read: recipe {other / 'config.yaml'} is not valid" in shown
    with raises(ConfigError, "required-field", "model", "what: unknown key"):
        status([str(other)], runs=run.parent, watch=None, as_json=False, ranks=False)


def test_what_others_left_in_a_run_folder_is_no_reason_to_show_nothing(run, capsys):
    """Regression: a KeyError, a ValueError: half-written and foreign files beside the run's own."""
    heartbeat_file.write(run, sign(0))
    (run / "heartbeats" / "rank-00001.json").write_text('{"beat": 1}')
    (run / "heartbeats" / "rank-00002.json").write_text(json.dumps(sign(2))[:-20])
    (run / "heartbeats" / "rank-all.json").write_text("{}")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe\n5\n[]\n{"seconds": 1}\n{"step": "x", "seconds": 1}\n')
        file.write(b'{"step": 11, "seconds": 0.5, "loss": "?", "tokens": null}\n')
    with (run / "starts.jsonl").open("a") as file:
        file.write('5\n{"event": "start", "step": 4, "world": "two", "time": 3, "host": 1, "job": 5, "found": 9}\n')
    for junk in ("step-abc", "step-1", ".tmp-step-x"):
        (run / "checkpoints" / junk).mkdir()
    (run / "environment.json").write_text("[]")
    found = Watcher(run).look()
    assert (found.step, found.loss, found.state, found.checkpoint, found.restarts) == (11, None, "compute", 8, 1)
    status([str(run)], runs=run.parent, watch=None, as_json=False, ranks=True)
    assert "train_step" in capsys.readouterr().out


def test_a_sweeps_runs_are_found_by_its_folder_and_by_the_arrays_number_or_one_tasks(run):
    """Regression: lost: squeue and cluster/submit say 4711 and 4711_2, the tasks know themselves by other numbers."""
    sweep = run.parent / "sweep"
    for task in (0, 2, 10):
        (sweep / str(task)).mkdir(parents=True)
        (sweep / str(task) / "config.yaml").write_text((run / "config.yaml").read_text())
        (sweep / str(task) / "starts.jsonl").write_text(begin(sweep, ago=9, job=f"88_{task}"))
    tasks = [sweep / str(task) for task in (0, 2, 10)]
    assert find([], run.parent) == [run, *tasks]
    assert find([str(sweep)], Path("elsewhere")) == find(["88"], run.parent) == tasks
    assert find(["88_2"], run.parent) == [sweep / "2"]
    assert find(["88_2", str(sweep)], run.parent) == [sweep / "2", sweep / "0", sweep / "10"]
    with raises(RunFolderError, "no-run-of-job", "88_1"):
        find(["88_1"], run.parent)


def test_a_start_of_an_array_goes_by_the_arrays_number(tmp_path, monkeypatch):
    for name, value in {"JOB_ID": "91", "ARRAY_JOB_ID": "88", "ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    Attempt(tmp_path, step=0, world=1)
    monkeypatch.delenv("SLURM_ARRAY_TASK_ID")
    Attempt(tmp_path, step=0, world=1)
    assert [start.job for start in read_starts(tmp_path)] == ["88_2", "91"]


def test_every_rank_is_shown_with_its_place(run):
    heartbeat_file.write(run, sign(0))
    heartbeat_file.write(run, sign(1, exit_code=75))
    head, first, second = every_rank(run).splitlines()
    assert head.split()[:3] == ["rank", "host", "pid"]
    assert re.fullmatch(r"0 +n1 +100 +[01] s ago +11 +compute +0 s +train/step.py:70 train_step", first)
    assert "exit code 75" in second


def test_durations_are_short():
    assert [duration(s) for s in (3, 89, 120, 7200, 200_000)] == ["3 s", "89 s", "2 min", "2.0 h", "2.3 d"]


# ------------------------------------------------------------------------------------------------------------- heartbeat
def test_a_line_written_over_a_longer_one_leaves_nothing_of_it(tmp_path):
    heartbeat_file.clear(tmp_path)
    for length in (300, 3000):
        heartbeat_file.write(tmp_path, sign(0) | {"at": "x" * length})
        assert len(heartbeat_file.read(tmp_path, 0)["at"]) == length
        heartbeat_file.write(tmp_path, sign(0))
    assert heartbeat_file.read(tmp_path, 0)["at"] == "train/step.py:70 train_step"
    assert (tmp_path / "heartbeats" / "rank-00000.json").stat().st_size == heartbeat_file.WIDTH


def test_a_new_start_forgets_the_signs_of_the_one_before(tmp_path):
    heartbeat_file.clear(tmp_path)
    heartbeat_file.write(tmp_path, sign(7))
    heartbeat_file.clear(tmp_path)
    assert heartbeat_file.read_all(tmp_path) == []
    assert heartbeat_file.write(tmp_path / "nowhere", sign(0)) is False


# --------------------------------------------------------------------------------------------------------------- profile
def test_a_profile_is_asked_of_a_living_job_and_of_steps_to_come(run):
    with raises(RunFolderError, "nothing-runs", run):
        ask_for_profile(run, range(15, 17))
    heartbeat_file.write(run, sign(0))
    with raises(ConfigError, "profile-step-over", "step 11", "31:32"):
        ask_for_profile(run, range(11, 13))
    assert "asked for steps 15 to 16 of 20" in ask_for_profile(run, range(15, 17))
    assert profile_request.take(run) == range(15, 17)
    assert profile_request.take(run) == range(0)


def test_nonsense_in_the_place_of_a_request_is_thrown_away(run):
    (run / profile_request.FILE).write_bytes(b"\xff\xfe")
    assert profile_request.take(run) == range(0)


def test_a_running_job_writes_the_profile_it_is_asked_for_and_its_figures_for_prometheus(tmp_path, dataset):
    recipe = recipe_file(tmp_path, dataset, train__steps=100_000, checkpoint__interval=100_000, watchdog__heartbeat=0.2)
    run = tmp_path / "run"
    job = start(1, "ssa_megatron", "train", str(recipe), "--run-folder", str(run))
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() and Watcher(run).look().step >= 3, job)
        first = Watcher(run).look().step + 100
        ask_for_profile(run, range(first, first + 2))
        stem = f"steps-{first}-{first + 1}-rank-0"
        wait_for((run / "profile" / f"{stem}.json.gz").exists, job)
        assert "aten::mm" in (run / "profile" / f"{stem}.txt").read_text()
        assert Watcher(run).look().alive
        wait_for((run / prometheus.FILE).exists, job)
    finally:
        kill(job)
    text = (run / prometheus.FILE).read_text()
    labels = f'{{run="run",folder="{run}"}}'
    assert f"# TYPE ssa_loss gauge\nssa_loss{labels} " in text
    assert f"ssa_step{labels} " in text


def test_prometheus_text_escapes_names_and_spells_what_is_no_number():
    values = {"eval/loss": float("nan"), "grad_norm": float("inf"), "note": "x", "applied": True, "eval_loss": 2}
    lines = prometheus.text(Path('/runs/a"b\\c'), values).splitlines()
    label = '{run="a\\"b\\\\c",folder="/runs/a\\"b\\\\c"}'
    assert lines[:3] == [
        "# HELP ssa_eval_loss In metrics.jsonl of the run.",
        "# TYPE ssa_eval_loss gauge",
        f"ssa_eval_loss{label} 2.0",  # a name twice would make the whole file invalid
    ]
    assert lines[5::3] == [f"ssa_grad_norm{label} +Inf", f"ssa_applied{label} 1.0"]


def test_two_runs_of_one_name_are_two_series_with_one_help():
    """Regression: a scrape that failed as a whole: node_exporter refuses equal series, and one name with two HELP texts."""
    first, second = (prometheus.text(Path(folder) / "run", {"loss": 1.0}).splitlines() for folder in ("/a", "/b"))
    assert first[:2] == second[:2]
    assert first[2] != second[2]


def test_an_evaluation_s_figures_are_not_gone_with_the_next_step():
    """Regression: lost: the file is written every 15 s, from whichever line was the newest then."""
    beat = Heartbeat.__new__(Heartbeat)
    beat._values = None
    for line in ({"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval/loss": 2.5}, {"step": 3, "loss": 1.5}):
        beat.values = line
    assert beat.values == {"step": 3, "loss": 1.5, "eval/loss": 2.5}
