"""What the exit codes of ranks mean to whoever started them: done, start again, hopeless, or crashed.

The codes are those of ssa_megatron/errors.py. A launch ends with one code for all its ranks, so that a scheduler can act on it.
"""

import contextlib
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)  # requests to stop in an orderly way

START_AGAIN = 75  # an orderly stop, agreed by all ranks: a committed checkpoint exists
HOPELESS = range(2, 8)  # a message with a remedy was printed: recipe, data, checkpoint, run folder, stopped, machine


class Interrupted(BaseException):
    """A signal came while no rank was running: nothing was lost, nothing has to be saved.

    No Exception: it may come in the middle of a library's import, whose `except Exception` would swallow it.
    """


def ending(codes: Iterable[int]) -> int | None:
    """The launch's exit code, from codes of its ranks; None for a crash, after which a restart is worth trying.

    Ranks stop together, but need not end alike: one that has said 75 or why it gave up speaks for those that were killed while
    they were still tidying up.
    """
    codes = list(codes)
    if START_AGAIN in codes:
        return START_AGAIN
    if not any(codes):
        return 0
    return next((code for code in codes if code in HOPELESS), None)


def describe(code: int) -> str:
    """An exit code of subprocess in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


class RestartBudget:
    """How many crashes in a row a launch restarts after: `limit`, counted anew whenever a newer checkpoint was committed.

    It ends crashes that come before the run folder's own account (ssa_megatron/train/restarts.py), which stops earlier and
    names the batch.
    """

    def __init__(self, run: Path, limit: int):
        self._latest, self.limit, self._used = run / "checkpoints" / "latest", limit, 0
        self._seen = self._read()

    def spend(self) -> bool:
        """One more crash; False when it is one too many."""
        now = self._read()
        if now != self._seen:
            self._seen, self._used = now, 0
        self._used += 1
        return self._used <= self.limit

    def _read(self) -> str:
        try:
            return self._latest.read_text()
        except OSError:
            return ""


def say(text: str) -> None:
    """A line of the launcher in the log, beside the ranks' own. A terminal that was closed, or a full disk, ends no launch."""
    with contextlib.suppress(OSError):
        print(f"launch: {text}", file=sys.stderr, flush=True)
