"""What a person asks of a running job, through its run folder: `ssa profile RUN A:B`.

The request is one small file. The writer rank's heartbeat thread takes it, and the ranks agree on it at a step's boundary.
"""

import os
from pathlib import Path

from ssa_megatron.errors import ConfigError, RunFolderError

FILE = "profile-request"


def parse_range(text: str | None) -> range:
    """`a:b`, both included, 1 <= a <= b -> range; None -> no steps. Raises ConfigError."""
    if text is None:
        return range(0)
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(
            f"{text} is not a range of steps to profile", remedy="e.g. 10:12, counted from 1", id="profile-range"
        )
    return range(int(first), int(last) + 1)


def place(run: Path, steps: range, *, now_at: int) -> Path:
    """Ask the running job for a profile of `steps`; `now_at` is the step it is in. Returns where it will be."""
    if steps[0] <= now_at:
        raise ConfigError(
            f"step {steps[0]} is over or about to be: the run is at step {now_at}",
            remedy=f"ask for later ones, e.g. {now_at + 20}:{now_at + 20 + len(steps) - 1}",
            id="profile-step-over",
        )
    temporary = run / f".tmp-{FILE}"
    try:
        temporary.write_text(f"{steps[0]}:{steps[-1]}\n")
        os.replace(temporary, run / FILE)
    except OSError as error:
        raise RunFolderError(
            f"{run} cannot be written: {error.strerror}",
            remedy="ask as the run's owner",
            id="profile-request-not-written",
        ) from None
    return run / "profile"


def take(run: Path) -> range:
    """The steps asked for, once; none when nothing or nonsense is asked."""
    try:
        text = (run / FILE).read_text()
        (run / FILE).unlink()
        return parse_range(text.strip())
    except (OSError, ValueError, ConfigError):
        return range(0)
