"""What a signal does: sent to whom, in which phase, how long until all ranks are gone, and what they leave.

`python -m tests.faults.signals OUT.json DATA [--all]` measures on the demo recipe, with the signals in turn or each with each.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ssa_megatron.checkpoint.manifest import committed
from ssa_megatron.train.heartbeat_file import read
from tests.launch import MODULES, ROOT, environment, kill, start

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
RECIPIENTS = ("rank 0", "rank 1", "torchrun", "launcher", "batch shell")
"""torchrun as it comes; the launcher is ssa_cluster.launch, and the batch shell, which starts it, a job script's."""
PAUSES = {"libraries": 8.0, "meeting": 2.0, "build": 2.0, "step": 2.0, "evaluation": 2.0, "save": 2.0, "data": 600.0}
"""Seconds that a phase is made to last; a process stays in it that long, unless it ends the wait itself."""


# cluster/job.sh as the templates use it; `scontrol` is SLURM's, and tests/cluster/test_slurm.py has a real one
BATCH = """
set -uo pipefail
source cluster/job.sh
scontrol() {{ echo "asked of SLURM: $*"; }}
SLURM_JOB_ID=7 SLURM_RESTART_COUNT=0
ssa_job {run} {command}
"""
# The launcher starts `python -u -m ssa_megatron` and nothing else; such a rank becomes the worker that lingers.
LINGER = """
import os, sys
if sys.orig_argv[1:4] == ["-u", "-m", "ssa_megatron"]:
    worker = [sys.executable, "-u", "-m", "tests.workers.paused", {phase!r}, {pause!r}, "all", {folder!r}]
    os.execv(sys.executable, worker + sys.orig_argv[4:])
"""


@dataclass
class Outcome:
    phase: str
    name: str
    recipient: str
    seconds: float
    """From the signal until no rank is left."""
    exits: list[int | None]
    """Exit codes of the ranks, from their last heartbeat or torchrun's list of failures; None where neither tells."""
    code: int | None
    """Of the job script, where there is one."""
    step: int
    """Of the newest committed checkpoint; 0 for none."""
    last: int
    """The last step in metrics.jsonl."""
    output: str


def deliver(phase: str, name: str, recipient: str, folder: Path, train: list[str], *, processes: int = 2) -> Outcome:
    """Run `train`, send `name` to `recipient` as soon as all ranks are in `phase`, wait for the end."""
    run = folder / "run"
    arguments = [*train, "--run-folder", str(run)]
    ours = recipient in ("launcher", "batch shell")
    if ours:
        job = start_batch(phase, folder, processes, arguments)
    else:
        job = start(processes, "tests.workers.paused", phase, str(PAUSES[phase]), "all", str(folder), *arguments)
    try:
        marks = [folder / f"{phase}-{rank}" for rank in range(processes)]
        wait_for(lambda: all(mark.exists() for mark in marks), job)
        ranks = ranks_of(job)
        # what is prolonged in save is a file's beginning: the signal shall meet a save under way, not its first moment
        time.sleep(0.3)
        if recipient == "launcher":
            target = ranks[0].ppid()
        else:
            target = ranks[int(recipient[-1])].pid if recipient.startswith("rank") else job.pid
        os.kill(target, signal.Signals[name])
        began = time.monotonic()
        gone, alive = psutil.wait_procs(ranks, timeout=60)
        seconds = time.monotonic() - began
        assert not alive, f"{phase}, {name} to {recipient}: {len(alive)} rank(s) alive after 60 s"
        output, _ = job.communicate(timeout=60)
    finally:
        kill(job)
    beats = [read(run, rank) for rank in range(processes)]
    told = {int(rank): int(code) for rank, code in re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", output)}
    told |= {0: gone[0].returncode} if processes == 1 else {}  # it was reaped there
    exits = [beat["exit"] if beat else told.get(rank) for rank, beat in enumerate(beats)]
    checkpoints = [int(path.name.removeprefix("step-")) for path in committed(run)] if run.is_dir() else []
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    last = json.loads(lines[-1])["step"] if lines else 0
    code = job.returncode if ours else None
    return Outcome(phase, name, recipient, round(seconds, 1), exits, code, max(checkpoints, default=0), last, output)


def start_batch(phase: str, folder: Path, processes: int, arguments: list[str]) -> subprocess.Popen:
    """A job script with two ranks that linger in `phase`."""
    (folder / "site").mkdir()
    linger = LINGER.format(phase=phase, pause=str(PAUSES[phase]), folder=str(folder))
    (folder / "site" / "sitecustomize.py").write_text(linger)
    command = [sys.executable, "-m", "ssa_cluster.launch", "--nproc-per-node", str(processes), *arguments]
    return subprocess.Popen(
        ["bash", "-c", BATCH.format(run=folder / "run", command=shlex.join(command))],
        cwd=ROOT,
        env=environment(PYTHONPATH=f"{folder / 'site'}:{MODULES}"),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # bash traps nothing that it finds ignored
    )


def wait_for(condition, job, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < end, f"not there within {seconds} s"
        time.sleep(0.05)


def ranks_of(job) -> list[psutil.Process]:
    """The ranks' processes in order; the process itself when it is the only one."""
    ranks = {}
    for child in psutil.Process(job.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            ranks[child.environ().get("RANK")] = child
    ranks.pop(None, None)
    return [ranks[key] for key in sorted(ranks)] or [psutil.Process(job.pid)]


def main() -> None:
    out, data = Path(sys.argv[1]), sys.argv[2]
    train = ["train", "demo", f"data.path={data}", "train.steps=500", "train.eval_interval=3", "checkpoint.interval=2"]
    found = []
    for i, phase in enumerate(PAUSES):
        for j, recipient in enumerate(RECIPIENTS):
            for name in SIGNALS if "--all" in sys.argv else (SIGNALS[(i + j) % 4],):
                with tempfile.TemporaryDirectory() as folder:
                    found.append(deliver(phase, name, recipient, Path(folder), train))
                shown = asdict(found[-1])
                shown.pop("output")
                print(shown, flush=True)
    out.write_text(json.dumps([asdict(outcome) for outcome in found], indent=1))


if __name__ == "__main__":
    main()
