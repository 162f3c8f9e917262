"""Stall timeout for shard reads: the clock runs only while training is blocked on a batch and no bytes arrive.

Work that is done ahead of its need may be retried for as long as prefetched rows last. A short outage therefore costs nothing,
a slow store costs time, and a store that is gone or silent is an error soon after training feels it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

STALL_TIMEOUT = 20.0  # seconds, the default; with the grace of `train_stream`, every rank has ended within 30
_POLL_INTERVAL = 0.25  # seconds between two looks at what has arrived


class StallTimer:
    """The clock of one stream, or, outside of a stream, of a caller that is blocked all the time. Thread-safe.

    seconds: of being blocked without progress, after which a failed read is an error.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.moved = time.monotonic()
        self._blocked_since = float("-inf")  # inf while the consumer is not blocked

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the consumer is blocked. After the first use it counts as not blocked outside."""
        self._blocked_since = time.monotonic()
        try:
            yield
        finally:
            self._blocked_since = float("inf")

    def end(self) -> None:
        """The stream is closed: pending work counts all of its time, so that no thread goes on for ever."""
        self._blocked_since = float("-inf")

    def progressed(self) -> None:
        """Bytes arrived, or work other than waiting was done; `moved` is set to now (time.monotonic())."""
        self.moved = time.monotonic()

    def left(self, stalled_since: float) -> float:
        """Seconds until a stall that began then is an error: 0 or less when it is one, inf while nothing is blocked."""
        return self.seconds - (time.monotonic() - max(stalled_since, self._blocked_since))


class Arrival:
    """Detects growth of the files `NAME*.part*` of a folder, whichever process writes them.

    A download that restarts and never passes its earlier size does not count as progress.
    """

    def __init__(self, folder: Path, name: str, stall_timer: StallTimer):
        self._folder, self._name, self._stall_timer = folder, name, stall_timer
        self._most: dict[str, int] = {}
        self._looked = float("-inf")
        self.seen()

    def seen(self) -> bool:
        """Whether a file grew since the last look; if so, the stall timer is informed. Looks at most four times per second."""
        if time.monotonic() - self._looked < _POLL_INTERVAL:
            return False
        self._looked, before = time.monotonic(), sum(self._most.values())
        for path in self._folder.glob(f"{self._name}*.part*"):
            with suppress(OSError):  # renamed or removed meanwhile
                begun = path.name.partition(".part")[0]  # the downloaders put a suffix of their own behind it
                self._most[begun] = max(self._most.get(begun, 0), path.stat().st_size)
        if sum(self._most.values()) == before:
            return False
        self._stall_timer.progressed()
        return True
