"""Progress of a long command on stderr: a bar on a terminal, a line every ten seconds in a log file.

Each stage shows how much is done, how fast it goes and when it will be finished. A stage that is over before there is
anything to say stays silent.
"""

import sys
import time
from collections.abc import Callable

_QUIET_SECONDS = 10  # between two lines of a log


def reporter() -> Callable[[str, int, int | None], None]:
    """A function to call with (stage, bytes done, bytes in all or None)."""
    return _bar() if sys.stderr.isatty() else _lines()


def _bar() -> Callable[[str, int, int | None], None]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True))
    stages: dict[str, TaskID] = {}

    def show(stage: str, done: int, total: int | None) -> None:
        if stage not in stages:
            stages[stage] = bar.add_task(stage, total=total)
            bar.start()
        bar.update(stages[stage], completed=done, total=total)
        if total is not None and done >= total:
            bar.stop()

    return show


def _lines() -> Callable[[str, int, int | None], None]:
    began: dict[str, float] = {}
    last = 0.0

    def show(stage: str, done: int, total: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if stage not in began:
            began[stage], last = now, now
        if now - last < _QUIET_SECONDS or not done:
            return
        last, speed = now, done / (now - began[stage])
        left = (
            f" of {total / 1e6:,.0f} MB ({done / total:.0%}), {(total - done) / speed:,.0f} s left" if total else " MB"
        )
        print(f"{stage}: {done / 1e6:,.0f}{left}, {speed / 1e6:.1f} MB/s", file=sys.stderr, flush=True)

    return show
