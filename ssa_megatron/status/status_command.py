"""`ssa status`, `ssa profile`: a table of runs, live if wanted, every rank of one run, and a profile of a running job.

A run is named by its folder, a sweep by the folder that holds its runs, and both by a SLURM job's number (4711, or 4711_3 for a
task of an array), which is looked up in the run folders under `--runs`.
"""

import json
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ssa_megatron.errors import RunFolderError, SSAError
from ssa_megatron.status.state import State, Watcher, duration
from ssa_megatron.train import heartbeat_file, profile_request
from ssa_megatron.train.restarts import read_starts

HEAD = ("run", "state", "step", "loss", "held out", "tok/s", "MFU", "goodput", "left", "checkpoint", "restarts")


def status(targets: list[str], *, runs: Path, watch: float | None, as_json: bool, ranks: bool) -> None:
    """Print once, or every `watch` seconds until interrupted. Raises RunFolderError for what is no run."""
    watchers = [Watcher(run) for run in find(targets, runs)]
    while True:
        states, unreadable = [], ""
        for watcher in watchers:
            try:
                states.append(watcher.look())
            except SSAError as error:  # of another release, or damaged: the others are still shown
                if len(watchers) == 1:
                    raise
                unreadable += f"\n{watcher.run} cannot be read: {error.problem.splitlines()[0]}"
        if as_json:
            text = json.dumps([asdict(state) for state in states], indent=1)
        else:
            text = table([HEAD, *map(row, states)]) + unreadable
            text += "".join(f"\n\n{watcher.run}\n{every_rank(watcher.run)}" for watcher in watchers if ranks)
        if watch is None:
            print(text)
            return
        # home, each line to its end, then what is below: no flicker, and nothing of the page before
        live = sys.stdout.isatty() and not as_json
        print("\033[H" + text.replace("\n", "\033[K\n") + "\033[J" if live else text, flush=True)
        try:
            time.sleep(watch)
        except KeyboardInterrupt:
            return


def find(targets: list[str], runs: Path) -> list[Path]:
    """Run folders of folders and job numbers; all under `runs`, those of sweeps included, when none is named."""
    known = _under(runs)
    if not targets:
        if not known:
            raise RunFolderError(
                f"no run folder under {runs}", remedy="name one: ssa status RUN, or --runs FOLDER", id="no-run-folder"
            )
        return known
    found = []
    for target in targets:
        folder = Path(target)
        if folder.is_dir() or not re.fullmatch(r"\d+(_\d+)?", target):
            inside = [] if (folder / "config.yaml").is_file() else _under(folder)
            found += inside or [folder]
            continue
        of_job = [run for run in known if any(_is_of(start.job, target) for start in read_starts(run))]
        if not of_job:
            raise RunFolderError(
                f"no run under {runs} was started by job {target}",
                remedy="name the run's folder, or --runs FOLDER",
                id="no-run-of-job",
            )
        found += of_job
    return list(dict.fromkeys(found))


def _under(folder: Path) -> list[Path]:
    """The run folders in `folder`, and those of sweeps in it (RUN/0, RUN/1, ...), in the order of their numbers."""
    configs = [*folder.glob("*/config.yaml"), *folder.glob("*/[0-9]*/config.yaml")]

    def order(run: Path) -> list[tuple[int, str]]:
        return [(int(part) if part.isdecimal() else 0, part) for part in run.relative_to(folder).parts]

    return sorted({path.parent for path in configs if path.is_file()}, key=order)


def _is_of(job: str | None, target: str) -> bool:
    """`4711` means job 4711, or every task of an array of that number; `4711_3` one task."""
    return job is not None and target in (job, job.partition("_")[0])


def row(state: State) -> tuple[str, ...]:
    def show(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    age = "" if state.checkpoint_age is None else f", {duration(state.checkpoint_age)} ago"
    died = f", {state.died} died" if state.died else ""
    left = "-" if state.seconds_left is None else duration(state.seconds_left)
    return (
        state.run,
        state.state,
        f"{state.step}/{state.steps}",
        show(state.loss, "{:.4f}"),
        show(state.evaluation, "{:.4f}"),
        show(state.tokens_per_second, "{:,.0f}"),
        show(state.mfu, "{:.1%}"),
        show(state.goodput, "{:.1%}"),
        left,
        "none" if state.checkpoint is None else f"{state.checkpoint}{age}",
        f"{state.restarts}{died}",
    )


def every_rank(run: Path) -> str:
    """Where each rank is, by its last sign of life."""
    now = time.time()
    lines: list[tuple[str, ...]] = [("rank", "host", "pid", "last sign", "step", "phase", "since", "at")]
    for beat in heartbeat_file.read_all(run):
        age = "" if beat["exit"] is not None else f"{max(0.0, now - beat['time']):.0f} s ago"
        phase = beat["phase"] if beat["exit"] is None else f"exit code {beat['exit']}"
        where = (
            beat["rank"],
            beat["host"],
            beat["pid"],
            age,
            beat["step"],
            phase,
            duration(beat["seconds"]),
            beat["at"],
        )
        lines.append(tuple(map(str, where)))
    return table(lines)


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in rows
    )


def ask_for_profile(run: Path, steps: range) -> str:
    """Have the running job of `run` record `steps`; the sentence to print. Raises RunFolderError when no job runs there."""
    state = Watcher(run).look()
    if not state.alive:
        raise RunFolderError(
            f"nothing runs in {run}: {state.state}",
            remedy=f"ssa train ... --profile {steps[0]}:{steps[-1]} records from a start on",
            id="nothing-runs",
        )
    where = profile_request.place(run, steps, now_at=max(state.step, heartbeat_file.read_all(run)[0]["step"]))
    return f"asked for steps {steps[0]} to {steps[-1]} of {state.steps}, the run is at {state.step}; they will be in {where}"
