"""cluster/job.sh on its own, where there is no SLURM: which endings ask for a requeue. test_slurm.py shows it on a real one."""

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import launch

# The job's command says when it is ready, and ends as the launcher would: with 75 when it is asked to, else with a code.
COMMAND = "trap 'exit 75' USR1; touch {run}/ready; for _ in $(seq {tenths}); do sleep 0.1; done; exit {code}"
SCRIPT = """
set -uo pipefail
source cluster/job.sh
scontrol() {{ echo "asked of SLURM: $*"; }}
SLURM_JOB_ID=7 SLURM_RESTART_COUNT={restarts}
{before}
ssa_job {run} bash -c "{command}"
"""


def start(run: Path, code: int, *, tenths: int = 0, restarts: int = 0, before: str = "") -> subprocess.Popen:
    run.mkdir(exist_ok=True)
    command = COMMAND.format(run=run, code=code, tenths=tenths).replace("$", "\\$")
    script = SCRIPT.format(run=run, command=command, restarts=restarts, before=before)
    return subprocess.Popen(
        ["bash", "-c", script],
        cwd=launch.ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where pytest is a background job
    )


ONCE_MORE = [(75, 0), (75, 99), (8, 0), (1, 0), (137, 99)]
NO_MORE = [(0, 0), (2, 0), (6, 0), (7, 0), (138, 0), (143, 0)]


@pytest.mark.parametrize(("code", "restarts"), [*ONCE_MORE, *NO_MORE])
def test_an_exit_code_is_requeued_or_not(tmp_path, code, restarts):
    process = start(tmp_path / "run", code, restarts=restarts)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == code
    assert ("asked of SLURM: requeue 7" in said) is ((code, restarts) in ONCE_MORE), said


def crashes(run: Path, times: int, before: str = "") -> list[bool]:
    """Whether SLURM is asked to requeue a job that crashes so often in a row."""
    asked = []
    for life in range(times):
        said, _ = start(run, 137, restarts=life, before=before).communicate(timeout=30)
        asked.append("asked of SLURM: requeue 7" in said)
    return asked


def test_crashes_are_counted_from_the_newest_checkpoint_and_by_job(tmp_path):
    """Regression: by SLURM's count of restarts: after three time limits a long run's first crash was its last."""
    run = tmp_path / "run"
    assert crashes(run, 4) == [True, True, True, False]
    assert (run / "logs" / "crashes").read_text() == "4 7 \n"
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "latest").write_text("step-00000010\n")
    assert crashes(run, 4) == [True, True, True, False]
    assert crashes(run, 1, before="SLURM_JOB_ID=8") == [False]  # asks for job 8
    assert (run / "logs" / "crashes").read_text() == "1 8 step-00000010\n"


def test_where_crashes_cannot_be_counted_slurms_restarts_are(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "logs").write_text("no folder")
    assert crashes(tmp_path / "run", 4) == [True, True, True, False]


@pytest.mark.parametrize("said", ["NodeName=n1 NodeAddr=10.0.0.1 X=1", ""])
def test_the_first_node_goes_by_its_name_while_the_controller_does_not_answer(said):
    """Regression: by nothing: the launchers then ended with 2, which is not requeued."""
    script = f"""source cluster/job.sh
    scontrol() {{ [[ $* != "show hostnames n[1-2]" ]] || echo n1; [[ $* != *"show node n1" ]] || echo "{said}"; }}
    SLURM_JOB_NODELIST="n[1-2]" ssa_host"""
    done = subprocess.run(
        ["bash", "-c", script], cwd=launch.ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == ("10.0.0.1\n" if said else "n1\n")


def test_a_crash_after_progress_is_requeued_however_often_it_was(tmp_path):
    latest = tmp_path / "run" / "checkpoints" / "latest"
    process = start(tmp_path / "run", 1, tenths=5, restarts=99)
    time.sleep(0.2)
    latest.parent.mkdir()
    latest.write_text("step-00000010")
    said, _ = process.communicate(timeout=30)
    assert "requeued, to go on from step-00000010" in said


@pytest.mark.parametrize(
    ("number", "requeued"),
    [(signal.SIGUSR1, True), (signal.SIGUSR2, True), (signal.SIGTERM, False), (signal.SIGINT, False)],
)
def test_a_signal_to_the_batch_shell_reaches_the_command(tmp_path, number, requeued):
    process = start(tmp_path / "run", 3, tenths=100)
    while not (tmp_path / "run" / "ready").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert ("asked of SLURM: requeue 7" in said) is requeued, said


@pytest.mark.parametrize(("name", "requeued"), [("USR1", True), ("TERM", False)])
def test_a_signal_before_the_command_is_not_lost(tmp_path, name, requeued):
    process = start(tmp_path / "run", 0, before=f"kill -{name} $$")
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert not (tmp_path / "run" / "ready").exists()
    assert ("asked of SLURM: requeue 7" in said) is requeued, said


def test_a_signal_between_the_commands_start_and_the_traps_for_it_is_not_lost(tmp_path):
    """Regression: lost: only counted, never passed on, so that the time limit came with nothing saved."""
    at_that_moment = """set -T; trap '[[ $BASH_COMMAND != "child=\\$!" ]] || { sleep 0.5; kill -USR1 $$; }' DEBUG"""
    process = start(tmp_path / "run", 3, tenths=100, before=at_that_moment)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 75, said
    assert "asked of SLURM: requeue 7" in said


def test_a_task_of_an_array_requeues_itself_and_not_the_whole_array(tmp_path):
    """Regression: lost: the task that has the array's own number restarted every other one."""
    process = start(tmp_path / "run", 75, before="SLURM_ARRAY_JOB_ID=7 SLURM_ARRAY_TASK_ID=3")
    said, _ = process.communicate(timeout=30)
    assert "asked of SLURM: requeue 7_3\n" in said
