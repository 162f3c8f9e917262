"""starts.jsonl: when a run was started and how each start ended, so that a batch that always kills does not burn a cluster.

A start that ended with a word (done, a signal, an error with a remedy) is no death; one that is followed by another start, and
said nothing, is. After a death the run goes on from its newest checkpoint; when the fourth start in a row from the same
checkpoint has died too, `check` refuses the next one and names the batches in which they died.
"""

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from ssa_megatron.errors import RunFolderError, TrainingStopped
from ssa_megatron.train.metrics import read_metrics

RESTARTS = 3  # without progress


@dataclass
class Start:
    """One start of a run; `ended` is what it said last, None if it died or still runs."""

    step: int
    """The step it began after: that of the checkpoint it restored, or 0."""
    world: int
    time: str
    host: str
    job: str | None
    """SLURM's job number, as squeue shows it: 4711, or 4711_3 for task 3 of an array."""
    ended: str | None = None
    reached: int | None = None
    """The last step it finished, as found by whoever came next."""

    def __post_init__(self):
        """Raises TypeError for a line that is not one of ours."""
        kinds = {"step": int, "world": int, "time": str, "host": str, "job": str | None}
        if wrong := [name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)]:
            raise TypeError(f"{', '.join(wrong)} of a start")


def read_starts(run: Path) -> list[Start]:
    """Every start of a run, in order; a line torn by a kill is left out. Of the last one `reached` is what metrics.jsonl says."""
    path = run / "starts.jsonl"
    starts: list[Start] = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            event = line.pop("event")
            if event == "start":
                if starts:
                    starts[-1].reached = line.pop("found")
                line.pop("found", None)
                starts.append(Start(**line))
            elif starts:
                starts[-1].ended = line["why"]
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    if starts:
        starts[-1].reached = _last_step(run)
    return starts


def check(run: Path, *, global_batch_rows: int) -> None:
    """Raise TrainingStopped if RESTARTS restarts in a row died without a newer checkpoint. Reads only; any rank may ask."""
    starts = read_starts(run)
    recent = starts[-(RESTARTS + 1) :]
    if len(recent) <= RESTARTS or any(start.ended or start.step != recent[0].step for start in recent):
        return
    died_in = sorted({max(start.reached or 0, start.step) + 1 for start in recent})
    what = ", ".join(
        f"step {step} (rows {(step - 1) * global_batch_rows}..{step * global_batch_rows - 1} of the stream)"
        for step in died_in
    )
    looks_like = "the batch of" if len(died_in) == 1 else "not always at the same place:"
    raise TrainingStopped(
        f"{len(recent)} starts of {run} in a row, all from step {recent[0].step}, died without a message: {looks_like} {what}",
        remedy=f"`ssa data ledger {run} {died_in[0]}` names the documents; the job's log has what the system said; when the "
        f"cause is gone, remove {run / 'starts.jsonl'} and give the same command again",
        id="crash-loop",
    )


class Attempt:
    """This start, in the run folder's account; the writer rank's."""

    def __init__(self, run: Path, *, step: int, world: int):
        """`step`: of the checkpoint it goes on from. Call before metrics.jsonl loses the steps that will run again."""
        self._path = run / "starts.jsonl"
        self._append(
            event="start",
            step=step,
            world=world,
            time=time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            host=socket.gethostname(),
            job=_job(),
            found=_last_step(run),
        )

    def end(self, why: str) -> None:
        """It ends with a word."""
        self._append(event="end", why=why, time=time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def _append(self, **line) -> None:
        try:
            torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
            with self._path.open("a") as file:
                file.write("\n" * (torn and self._path.stat().st_size > 0) + json.dumps(line) + "\n")
        except OSError as error:
            raise RunFolderError(
                f"{self._path} cannot be written: {error.strerror}",
                remedy="make room, or mend the folder's permissions",
                id="starts-not-written",
            ) from None


def _job() -> str | None:
    # each task of an array has a job number of its own, which no command of SLURM's prints unasked
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = read_metrics(path, skip_damaged=True) if path.exists() else []
    return lines[-1]["step"] if lines else 0
