"""Signals that ask for an orderly end: a committed checkpoint, then exit code 75 ("start me again").

The handler only notes the request; the loop asks all ranks after every step, so that they stop at the same one. A second
signal of the same kind ends the process at once.
"""

import signal

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    def __init__(self):
        self.received: signal.Signals | None = None

    def listen(self) -> "StopRequest":
        for number in HANDLED:
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, _frame) -> None:
        if self.received == number:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received = signal.Signals(number)
