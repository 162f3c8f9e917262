"""The launcher on one machine: what it refuses, the code it ends with, and when it stops restarting."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ssa_cluster.launch import parse
from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.restarts import read_starts
from tests import launch
from tests.ssa_megatron.conftest import corpus, dataset, tokenizer  # noqa: F401 (fixtures)
from tests.ssa_megatron.support import recipe_file

TRAIN = ("train", "demo", "--run-folder", "runs/x")
MURDERER = """
import json, os, signal, sys, threading, time
from pathlib import Path

def last_step(path):
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0

def watch(path):
    while last_step(path) == 3:  # left by the one before
        time.sleep(0.01)
    while last_step(path) != 3:
        time.sleep(0.002)
    os.kill(os.getpid(), signal.SIGKILL)

if "--run-folder" in sys.orig_argv and "ssa_megatron" in sys.orig_argv:
    run = Path(sys.orig_argv[sys.orig_argv.index("--run-folder") + 1])
    threading.Thread(target=watch, args=(run / "metrics.jsonl",), daemon=True).start()
"""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "2:1", *TRAIN), "--nodes 2:1 is neither N nor MIN:MAX"),
        (("--nodes", "0", *TRAIN), "--nodes 0 is neither N nor MIN:MAX"),
        (("--nodes", "2", *TRAIN), "--host is needed with several nodes"),
        (("--nodes", "2", "--host", "10.0.0.1:port", *TRAIN), "--host 10.0.0.1:port is neither HOST nor HOST:PORT"),
        (("--host", "10.0.0.1:0", *TRAIN), "--host 10.0.0.1:0 is neither HOST nor HOST:PORT"),
        (("--nproc-per-node", "0", *TRAIN), "--nproc-per-node must be at least 1"),
        (("train", "demo"), "give `train RECIPE ... --run-folder RUN`"),
        (("plan", "demo", "--run-folder", "x"), "give `train RECIPE ... --run-folder RUN`"),
        ((), "give `train RECIPE ... --run-folder RUN`"),
        (("train", "demo", "--run-folder="), "give `train RECIPE ... --run-folder RUN`"),
        (("--node", "2", *TRAIN), "unrecognized arguments"),
        (("--silence", "0", *TRAIN), "--silence 0.0 is no number of seconds above 0"),
        (("--grace", "nan", *TRAIN), "--grace nan is no number of seconds above 0"),
        (("--join-timeout", "-1", *TRAIN), "--join-timeout -1 is no number of seconds above 0"),
    ],
)
def test_a_command_line_that_cannot_work_says_why(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(list(arguments))
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_under_slurm_nodes_rank_host_and_port_come_from_the_job(monkeypatch):
    job = {"SLURM_JOB_ID": "4711", "SLURM_NODEID": "3", "SLURM_NNODES": "8", "SSA_HOST": "10.0.0.1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    found = parse(["--nproc-per-node", "8", *TRAIN])
    assert (found.fewest, found.most, found.node_rank, found.hosting) == (8, 8, 3, False)
    assert (found.host, found.port, found.id) == ("10.0.0.1", 14711, "slurm-4711")
    monkeypatch.setenv("SSA_HOST", "10.0.0.1:29999")
    assert parse(list(TRAIN)).port == 29999
    monkeypatch.setenv("SSA_HOST", "[fd00::1]:29999")
    assert parse(list(TRAIN)).host == "fd00::1"


def test_a_launcher_per_gpu_instead_of_per_node_is_refused(monkeypatch, capsys):
    """Regression: 8 launchers on a node, each with 8 ranks and the same node rank, fighting for one port."""
    job = {"SLURM_JOB_ID": "4711", "SLURM_NODEID": "0", "SLURM_NNODES": "2", "SSA_HOST": "10.0.0.1"}
    for name, value in {**job, "SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        parse(["--nproc-per-node", "8", *TRAIN])
    assert "srun started 16 launchers on 2 node(s); one a node: srun --ntasks-per-node=1" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert parse(["--nproc-per-node", "8", *TRAIN]).fewest == 2
    monkeypatch.delenv("SLURM_NNODES")
    with pytest.raises(SystemExit):
        parse(list(TRAIN))


def test_ranks_that_srun_started_without_a_launcher_are_told_how_to(tmp_path):
    """Regression: each trained alone: the first in the run folder, the others refused two minutes later."""
    run = tmp_path / "run"
    said = launch.run(
        1,
        "ssa_megatron",
        "train",
        "demo",
        "--run-folder",
        str(run),
        expect=2,
        SLURM_STEP_NUM_TASKS="8",
        SLURM_PROCID="3",
    )
    assert "srun started 8 processes, and nothing has told them of each other" in said
    assert "srun --ntasks-per-node=1 python -m ssa_cluster.launch" in said
    assert not run.exists()
    alone = {"SLURM_STEP_NUM_TASKS": "8", "WORLD_SIZE": "1"}  # a shell of `srun --pty`, as the remedy says
    said = launch.run(1, "ssa_megatron", "train", "demo", "--run-folder", str(run), expect=2, **alone)
    assert "data.path is not given" in said


def test_host_names_with_a_domain_and_ports_are_told_apart():
    for host, expected in {
        "node-1.cluster.example.org": ("node-1.cluster.example.org", 29500),
        "node_1:30000": ("node_1", 30000),
        "[fd00::1]": ("fd00::1", 29500),
    }.items():
        found = parse(["--nodes", "2", "--host", host, *TRAIN])
        assert (found.host, found.port) == expected


def test_the_run_folder_is_understood_in_both_spellings_that_ssa_train_takes():
    """Regression: only as two words; the other was refused as missing."""
    assert parse(["train", "demo", "--run-folder=runs/y"]).run == Path("runs/y")
    assert parse(["train", "demo", "--run-folder", "runs/y", "train.steps=3"]).run == Path("runs/y")


def test_a_first_node_that_never_comes_is_a_crash_which_is_requeued_and_not_hopeless(tmp_path):
    """Regression: 7, which no scheduler requeues: a job whose first node had died was over."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        options = ("--nodes", "2", "--node-rank", "1", "--host", f"127.0.0.1:{port}", "--join-timeout", "2")
        process = start(*options, *TRAIN)
        said = finish(process, 60)
    assert process.returncode == 1, said
    assert f"127.0.0.1:{port} did not answer for 2 s: is node rank 0 up, and the port open?" in said


def test_a_port_that_is_taken_is_named_with_the_remedy(tmp_path):
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        options = ("--nodes", "2", "--node-rank", "0", "--host", f"127.0.0.1:{port}", "--join-timeout", "20")
        process = start(*options, "train", "demo", "--run-folder", str(tmp_path / "run"))
        said = finish(process, 90)
    assert process.returncode == 1, said
    assert f"launch: port {port} of 127.0.0.1 cannot be used" in said
    assert "--host 127.0.0.1:PORT takes another" in said


def test_the_launchs_code_survives_threads_that_still_talk_to_the_store():
    """Regression: lost, now and then on nodes other than the first: 134 instead of 0, so a finished run was requeued."""
    code = """if 1:
        import threading, time
        from datetime import timedelta
        from torch.distributed import TCPStore
        from ssa_cluster.launch import _leave
        server = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=5))
        def talk():
            client = TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=5))
            while True:
                client.set("beat", "1")
        for _ in range(4):
            threading.Thread(target=talk, daemon=True).start()
        time.sleep(0.5)
        _leave(3)
    """
    command = [sys.executable, "-c", code]
    ended = subprocess.run(
        command, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 3, ended.stderr


def asked_to_start_again(code: str) -> subprocess.CompletedProcess:
    """Python's `code`, run to its end, which is 75."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75, done.stderr
    return done


def test_a_signal_that_comes_while_another_is_dealt_with_changes_no_code():
    """Regression: 1, a crash, when srun and scancel signalled within a millisecond, before any rank ran."""
    code = """if 1:
        import os, signal
        from ssa_cluster import launch
        def own_address(host, **_):
            os.kill(os.getpid(), signal.SIGUSR1)
        def say(text):
            for number in launch.FORWARDED:
                os.kill(os.getpid(), number)
            print(text)
        launch.own_address, launch.say = own_address, say
        launch._leave(launch.main(["train", "demo", "--run-folder", "x"]))
    """
    done = asked_to_start_again(code)
    assert "SIGUSR1 before any rank ran; the same command starts the run" in done.stdout


def test_a_signal_whose_exception_a_library_swallows_is_heard_all_the_same():
    """Regression: the ranks were started: an import's C code had cleared the exception."""
    code = """if 1:
        import contextlib, os, signal
        from ssa_cluster import launch
        def own_address(host, **_):
            with contextlib.suppress(BaseException):
                os.kill(os.getpid(), signal.SIGTERM)
            return "127.0.0.1"
        launch.own_address = own_address
        launch._leave(launch.main(["train", "no-such-recipe", "--run-folder", "x"]))
    """
    done = asked_to_start_again(code)
    assert "SIGTERM before any rank ran" in done.stderr


def start(*arguments: str, **extra: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "ssa_cluster.launch", "--nproc-per-node", "2", *arguments],
        cwd=launch.ROOT,
        env=launch.environment(**extra),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen, timeout: float) -> str:
    try:
        return process.communicate(timeout=timeout)[0]
    finally:
        launch.kill(process)


def test_the_launch_ends_with_the_code_of_its_ranks_and_does_not_restart_what_is_hopeless(tmp_path):
    process = start("train", "demo", "train.stepz=3", "--run-folder", str(tmp_path / "run"))
    said = finish(process, 120)
    assert process.returncode == 2, said
    assert "did you mean 'steps'?" in said
    assert "restarting" not in said


def test_a_signal_to_the_launcher_is_a_committed_checkpoint_and_exit_code_75(dataset, tmp_path):  # noqa: F811
    recipe, run = recipe_file(tmp_path, dataset, train__steps=100_000, checkpoint__interval=100_000), tmp_path / "run"
    process = start("train", str(recipe), "--run-folder", str(run))
    try:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").exists() or len(read_metrics(run / "metrics.jsonl")) < 2:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
    finally:
        said = finish(process, 90)
    assert process.returncode == 75, said
    assert Checkpoint.open(run).content.step == read_metrics(run / "metrics.jsonl")[-1]["step"]
    [begun] = read_starts(run)
    assert (begun.step, begun.world, begun.reached) == (0, 2, Checkpoint.open(run).content.step)
    assert begun.ended.startswith("stopped by SIG")
    assert len(family) == 2
    assert not [member for member in family if member.is_running()]


def test_a_terminal_that_is_closed_ends_no_training(dataset, tmp_path):  # noqa: F811
    """Regression: the first line that could not be printed did: on the rank, and again in the launcher that was to restart it."""
    recipe, run = recipe_file(tmp_path, dataset, train__steps=30, checkpoint__interval=100), tmp_path / "run"
    terminal, end = pty.openpty()
    command = [sys.executable, "-m", "ssa_cluster.launch", "--nproc-per-node", "2", "train", str(recipe)]
    command += ["logging.interval=1", "--run-folder", str(run)]
    inside = {"stdin": end, "stdout": end, "stderr": end, "start_new_session": True}
    process = subprocess.Popen(command, cwd=launch.ROOT, env=launch.environment(), **inside)
    os.close(end)
    try:
        said, deadline = b"", time.monotonic() + 200
        while b"step  2/30" not in said:
            assert time.monotonic() < deadline, said
            said += os.read(terminal, 4096)
        os.close(terminal)
        os.killpg(process.pid, signal.SIGHUP)  # as the system does to the terminal's processes
        assert process.wait(timeout=120) == 0
    finally:
        launch.kill(process)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(1, 31))
    assert [start.ended for start in read_starts(run)] == ["done"]


def test_what_the_launcher_says_on_a_full_disk_ends_nothing():
    code = "from ssa_cluster.exit_codes import say; from ssa_cluster.launch import _leave; say('x'); _leave(75)"
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=launch.ROOT, env=launch.environment(), stdout=full, stderr=full, timeout=60)
    assert done.returncode == 75


EARLY = """
import os, pathlib, signal, sys, time
ended = pathlib.Path("ended")
if os.environ["RANK"] == "0":  # asked while it loaded its libraries
    time.sleep(1)
    ended.touch()
    sys.exit(75)
def heard(*_):
    print(f"heard {time.time() - ended.stat().st_mtime:.1f} s later", flush=True)
    sys.exit(75)
signal.signal(signal.SIGUSR1, heard)
time.sleep(60)
"""


def test_a_rank_that_ended_early_is_followed_by_the_others_at_once(tmp_path):
    """Regression: after ten seconds, with SIGKILL: they loaded their libraries, and waited for one that was gone."""
    (tmp_path / "ssa_megatron").mkdir()
    (tmp_path / "ssa_megatron" / "__init__.py").touch()
    (tmp_path / "ssa_megatron" / "__main__.py").write_text(EARLY)
    command = [sys.executable, "-m", "ssa_cluster.launch", "--nproc-per-node", "2", *TRAIN]
    done = subprocess.run(
        command, cwd=tmp_path, env=launch.environment(), capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 75, done.stdout + done.stderr
    assert float(re.search(r"heard (\S+) s later", done.stdout)[1]) < 3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_batch_that_always_kills_stops_the_launch_and_is_named(dataset, tmp_path):  # noqa: F811
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(MURDERER)
    recipe, run = recipe_file(tmp_path, dataset, train__steps=9, checkpoint__interval=2), tmp_path / "run"
    environment = {"PYTHONPATH": f"{tmp_path / 'site'}:{launch.MODULES}"}
    process = start("train", str(recipe), "--run-folder", str(run), **environment)
    said = finish(process, 800)
    assert process.returncode == 6, said[-4000:]
    assert said.count("restarting from the last committed checkpoint") == 5  # one from step 0, then four from step 2
    assert "the batch of step 4 (rows 12..15 of the stream)" in said
    assert f"ssa data ledger {run} 4" in said
    assert Path(run / "checkpoints" / "latest").read_text().strip() == "step-00000002"
