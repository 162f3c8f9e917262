"""Signals that ask for an orderly end: a committed checkpoint, then exit code 75 ("start me again").

The handler only notes the request; the loop asks all ranks after every step, so that they stop at the same one. A second
signal of the same kind ends the process at once, unless it is the echo of the first: schedulers signal whole groups, and a rank
hears the same request from SLURM, from srun and from its launcher.
"""

import signal
import time

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
ECHO_SECONDS = 5.0  # a second signal of the same kind is another request only after this


class StopRequest:
    def __init__(self):
        self.received: signal.Signals | None = None
        self._first: dict[int, float] = {}

    def listen(self) -> "StopRequest":
        for number in HANDLED:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame) -> None:
        if time.monotonic() - self._first.setdefault(number, time.monotonic()) > ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
