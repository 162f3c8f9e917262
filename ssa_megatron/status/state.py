"""Where a run stands, read from its folder: nothing is asked of the job, nothing is written, no torch is imported.

Goodput is the time in which steps that count were made, over the time since the run first started: what restarts, repeated
steps and waiting in queues cost is missing from it.
"""

import json
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ssa_megatron.checkpoint.manifest import committed
from ssa_megatron.config import Recipe, load_recipe
from ssa_megatron.errors import EXIT_HUNG, EXIT_REQUEUE, RunFolderError
from ssa_megatron.planning.hardware import TABLE
from ssa_megatron.planning.step_time import flops_per_token
from ssa_megatron.train import heartbeat_file
from ssa_megatron.train.restarts import Start, read_starts

RECENT = 50  # steps that speed and the time left are taken from
ENDS = {0: "done", EXIT_REQUEUE: "stopped; start it again", EXIT_HUNG: "hung, see logs/; start it again"}


@dataclass(frozen=True)
class State:
    """None where the folder does not tell."""

    run: str
    state: str
    alive: bool
    step: int
    steps: int
    loss: float | None
    evaluation: float | None
    tokens_per_second: float | None
    mfu: float | None
    goodput: float | None
    seconds_left: float | None
    checkpoint: int | None
    checkpoint_age: float | None
    restarts: int
    died: int
    """Of the starts before this one, those that ended without a word."""
    world: int | None
    job: str | None


class Watcher:
    """Reads one run again and again; of metrics.jsonl only what is new."""

    def __init__(self, run: Path):
        """Raises RunFolderError when `run` is not a run folder."""
        if not (run / "config.yaml").is_file():
            raise RunFolderError(
                f"{run} is not a run folder: it has no config.yaml",
                remedy="check the path",
                id="status-not-a-run-folder",
            )
        self.run, self._productive, self._offset = run, 0.0, 0
        self._lines: deque[dict] = deque(maxlen=RECENT)
        self._file: tuple[int, int] | None = None
        self._evaluation: float | None = None
        self._starts: tuple[int, list[Start]] = (-1, [])

    def look(self) -> State:
        recipe = load_recipe(str(self.run / "config.yaml"))
        self._read_metrics()
        now, signs = time.time(), heartbeat_file.read_all(self.run)
        starts = self._read_starts()
        state, alive = _state(recipe, signs, now)
        last = self._lines[-1] if self._lines else {}
        seconds = sum(line["seconds"] for line in self._lines) / max(1, len(self._lines))
        speed = recipe.train.global_batch_rows * recipe.train.sequence_length / seconds if seconds else None
        checkpoint = next(iter(committed(self.run)), None)
        world = starts[-1].world if starts else None
        step = last.get("step", starts[-1].step if starts else 0)
        return State(
            run=str(self.run),
            state=state,
            alive=alive,
            step=step,
            steps=recipe.train.steps,
            loss=last.get("loss"),
            evaluation=self._evaluation,
            tokens_per_second=speed,
            mfu=self._mfu(recipe, speed, world),
            goodput=_goodput(self._productive, starts, signs, alive, now),
            seconds_left=seconds * (recipe.train.steps - step) if alive and seconds else None,
            checkpoint=int(checkpoint.name.removeprefix("step-")) if checkpoint else None,
            checkpoint_age=_age(checkpoint, now),
            restarts=max(0, len(starts) - 1),
            died=sum(start.ended is None for start in starts[:-1]),
            world=world,
            job=starts[-1].job if starts else None,
        )

    def _read_starts(self) -> list[Start]:
        path = self.run / "starts.jsonl"
        size = path.stat().st_size if path.exists() else 0
        if size != self._starts[0]:  # it also reads metrics.jsonl, all of it
            self._starts = (size, read_starts(self.run))
        return self._starts[1]

    def _read_metrics(self) -> None:
        path = self.run / "metrics.jsonl"
        try:
            about = path.stat()
            if (about.st_dev, about.st_ino) != self._file or about.st_size < self._offset:  # a resume wrote it anew
                self._file, self._offset, self._productive = (about.st_dev, about.st_ino), 0, 0.0
                self._lines.clear()
            with path.open("rb") as file:
                file.seek(self._offset)
                new = file.read()
        except OSError:
            return
        new = new[: new.rfind(b"\n") + 1]  # a line being written is read the next time
        self._offset += len(new)
        for text in new.splitlines():
            if line := _figures(text):
                self._productive += line["seconds"]
                self._lines.append(line)
                self._evaluation = line.get("eval/loss_full", line.get("eval/loss", self._evaluation))

    def _mfu(self, recipe: Recipe, speed: float | None, world: int | None) -> float | None:
        try:
            gpu = (json.loads((self.run / "environment.json").read_text()).get("gpu") or "").lower()
        except (OSError, ValueError, AttributeError):
            return None
        row = next((row for name, row in TABLE.items() if name in gpu), None)
        if not (row and speed and world):
            return None
        return speed * flops_per_token(recipe) / (world * row.peak_flops)


def _figures(text: bytes) -> dict | None:
    """A line of metrics.jsonl: what is a number in it; None for a torn line, and for what has no step and no duration."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    numbers = {name: value for name, value in line.items() if type(value) in (int, float)} if type(line) is dict else {}
    return numbers if type(numbers.get("step")) is int and "seconds" in numbers else None


def _state(recipe: Recipe, signs: list[dict], now: float) -> tuple[str, bool]:
    """In words, and whether the job lives."""
    if not signs:
        return "no sign of life", False
    first = signs[0]
    ended = [sign["exit"] for sign in signs if sign["exit"] is not None]
    if ended:
        worst = next((code for code in ended if code), 0)
        return ENDS.get(worst, f"ended with exit code {worst}"), False
    ages = {sign["rank"]: max(0.0, now - sign["time"]) for sign in signs}
    limit = 5 * recipe.watchdog.heartbeat + 5
    silent = [rank for rank, age in ages.items() if age > limit]
    if len(silent) == len(signs):
        return f"no sign of life for {duration(min(ages.values()))}", False
    if silent:
        names = ", ".join(map(str, silent[:4])) + (", ..." if len(silent) > 4 else "")
        return f"rank {names} silent for {duration(max(ages.values()))}", True
    return f"{first['phase']} for {duration(first['seconds'])}" if first["seconds"] > 30 else first["phase"], True


def _age(checkpoint: Path | None, now: float) -> float | None:
    """Seconds; 0 where this machine's clock is behind the file system's."""
    try:
        return max(0.0, now - checkpoint.stat().st_mtime) if checkpoint else None
    except FileNotFoundError:  # pruned since it was found
        return None


def _goodput(productive: float, starts: list[Start], signs: list[dict], alive: bool, now: float) -> float | None:
    if not starts or not productive:
        return None
    try:
        began = datetime.strptime(starts[0].time, "%Y-%m-%dT%H:%M:%S%z").timestamp()
    except ValueError:
        return None
    until = now if alive or not signs else max(sign["time"] for sign in signs)
    return min(1.0, productive / max(until - began, productive))


def duration(seconds: float) -> str:
    """`41 s`, `12 min`, `3.4 h`, `9.1 d`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"
