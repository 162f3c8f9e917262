"""What a signal does: sent to whom, in which phase, how long until all ranks are gone, and what they leave.

`python -m tests.faults.signals OUT.json DATA [--all]` measures on the demo recipe, with the signals in turn or each with each.
"""

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ssa_megatron.checkpoint.manifest import committed
from ssa_megatron.train.beats import read
from tests.launch import kill, start

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")
RECIPIENTS = ("rank 0", "rank 1", "torchrun")
PAUSES = {"libraries": 8.0, "meeting": 2.0, "build": 2.0, "step": 2.0, "evaluation": 2.0, "save": 2.0, "data": 600.0}
"""Seconds that a phase is made to last; a process stays in it that long, unless it ends the wait itself."""


@dataclass
class Outcome:
    phase: str
    name: str
    recipient: str
    seconds: float
    """From the signal until no rank is left."""
    exits: list[int | None]
    """Exit codes of the ranks, from their last heartbeat or torchrun's list of failures; None where neither tells."""
    step: int
    """Of the newest committed checkpoint; 0 for none."""
    last: int
    """The last step in metrics.jsonl."""
    output: str


def deliver(phase: str, name: str, recipient: str, folder: Path, train: list[str], *, processes: int = 2) -> Outcome:
    """Run `train`, send `name` to `recipient` as soon as all ranks are in `phase`, wait for the end."""
    run = folder / "run"
    arguments = [*train, "--run-folder", str(run)]
    job = start(processes, "tests.workers.paused", phase, str(PAUSES[phase]), "all", str(folder), *arguments)
    try:
        marks = [folder / f"{phase}-{rank}" for rank in range(processes)]
        wait_for(lambda: all(mark.exists() for mark in marks), job)
        ranks = ranks_of(job)
        # what is prolonged in save is a file's beginning: the signal shall meet a save under way, not its first moment
        time.sleep(0.3)
        os.kill(job.pid if recipient == "torchrun" else ranks[int(recipient[-1])].pid, signal.Signals[name])
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
    return Outcome(phase, name, recipient, round(seconds, 1), exits, max(checkpoints, default=0), last, output)


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
