"""Signals that ask for an orderly end: a committed checkpoint, then exit code 75 (retryable), in every phase.

A thread notes the request the moment it comes, also while the main thread sits in a collective. Until the processes meet,
nothing depends on this one and it ends at once; from then on the ranks ask each other and stop at the same step. Signals may
come as often as they like (torchrun and SLURM each deliver their own); only a second SIGINT, by a person, ends the process.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from ssa_megatron.errors import EXIT_REQUEUE

HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
MEETING = 5.0  # seconds that a signalled process still waits for the others to meet it
ECHO_SECONDS = (
    5.0  # seconds in which a second SIGINT is the first one again: a rank hears it from SLURM, srun and its launcher
)
LOOK = 1.0  # seconds between two looks at who our parent is


class StopAsked(BaseException):
    """Raised in the main thread inside `StopRequest.interruptible`. No Exception: code that retries must not retry it."""


class StopRequest:
    """`reason`: None, or who asked for the end, in words. Constructed and used by the main thread."""

    def __init__(self):
        self.reason: str | None = None
        self._stage = "alone"
        self._interruptible = False
        self._first_interrupt: float | None = None

    def listen(self) -> "StopRequest":
        """Install the handlers and the thread; call it before anything slow."""
        self._pipe, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        # torchrun without --signals-to-handle dies of SIGUSR1 and leaves its ranks to nobody; so does kill -9
        parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        threading.Thread(target=self._watch, args=(parent,), name="signals", daemon=True).start()
        for number in HANDLED:
            signal.signal(number, self._handle)
        return self

    def meeting(self) -> None:
        """The processes begin to look for each other: from here on others may be about to depend on this one."""
        self._stage = "meeting"

    def met(self) -> None:
        """The processes have met: from here on the ranks agree (`ParallelState.all_reduce_max`) before any of them ends."""
        self._stage = "met"

    def ask(self, reason: str) -> None:
        """Note a request; the first one is the reason. From any thread: a main thread that waits for data is woken."""
        self.reason = self.reason or reason
        main = threading.main_thread()
        if self._interruptible and threading.current_thread() is not main and main.ident is not None:
            signal.pthread_kill(main.ident, signal.SIGUSR2)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, a request raises StopAsked: for waits that others may have to end, such as the one for data."""
        try:
            self._interruptible = True
            if self.reason:
                raise StopAsked(self.reason)
            yield
        finally:
            self._interruptible = False

    def _handle(self, number: int, _frame) -> None:
        self.ask(signal.Signals(number).name)
        if self._interruptible:
            self._interruptible = False
            raise StopAsked(self.reason)

    def _watch(self, parent: int | None) -> None:
        deadline = None
        while True:
            ready, _, _ = select.select([self._pipe], [], [], LOOK)
            for number in os.read(self._pipe, 64) if ready else b"":
                if number in HANDLED:  # the pipe gets every signal that has a handler, whoever installed it
                    self._note(signal.Signals(number))
            if parent is not None and os.getppid() != parent:
                parent = None
                self.ask("the end of its launcher")
            if self.reason is None or self._stage == "met":
                continue
            deadline = deadline or time.monotonic() + (MEETING if self._stage == "meeting" else 0)
            if time.monotonic() >= deadline:
                _end(
                    f"stopped by {self.reason} before training began: nothing to save; run the same command again",
                    EXIT_REQUEUE,
                )

    def _note(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            if self._first_interrupt is not None and now - self._first_interrupt > ECHO_SECONDS:
                _end("ended at once by a second SIGINT", 128 + number)
            self._first_interrupt = self._first_interrupt or now
        self.ask(number.name)


def _end(text: str, code: int) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        print(text, file=sys.stderr, flush=True)
    os._exit(code)  # the main thread may sit in a call that nothing interrupts
