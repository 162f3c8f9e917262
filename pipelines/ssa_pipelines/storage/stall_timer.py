"""How long trouble is borne: seconds in which somebody waits and nothing comes.

What is fetched before it is needed may be tried again for as long as rows that are here already last; the clock runs only
while the training loop stands still, and every piece that arrives starts it anew. So a short outage costs nothing, a slow
store costs time, and one that is gone or silent is an error soon after it is felt.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PATIENCE = 20.0  # seconds, by default; with what follows, every rank has ended within 30
_LOOK = 0.25  # seconds between two looks at what has arrived


class Patience:
    """The clock of one stream, or, outside of one, of a caller who waits all the time.

    seconds: of waiting in which nothing comes, after which trouble is an error. Any thread may ask.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.moved = time.monotonic()
        self._since = float("-inf")  # when the one who waits began to; inf while nobody does

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, somebody waits; once it has been used, nobody does outside."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = float("inf")

    def end(self) -> None:
        """Nobody will wait again: what is under way counts all of its trouble, so that no thread goes on for ever."""
        self._since = float("-inf")

    def alive(self) -> None:
        """Something has come, or is being done that is no wait: noted in `moved`, by the clock of time.monotonic()."""
        self.moved = time.monotonic()

    def left(self, trouble_since: float) -> float:
        """Seconds until trouble that began then is an error, 0 or less when it is one; inf while nobody waits."""
        return self.seconds - (time.monotonic() - max(trouble_since, self._since))


class Arrival:
    """Sees files come, whoever brings them: one of the files `NAME*.part*` of a folder is larger than it ever was.

    A file that is begun again and again, and never gets further than before, is as good as silent.
    """

    def __init__(self, folder: Path, name: str, patience: Patience):
        self._folder, self._name, self._patience = folder, name, patience
        self._most: dict[str, int] = {}
        self._looked = float("-inf")
        self.seen()

    def seen(self) -> bool:
        """Whether something has come since it last looked, which is no more often than useful; the patience hears of it."""
        if time.monotonic() - self._looked < _LOOK:
            return False
        self._looked, before = time.monotonic(), sum(self._most.values())
        for path in self._folder.glob(f"{self._name}*.part*"):
            with suppress(OSError):  # renamed or removed meanwhile
                begun = path.name.partition(".part")[0]  # the downloaders put a suffix of their own behind it
                self._most[begun] = max(self._most.get(begun, 0), path.stat().st_size)
        if sum(self._most.values()) == before:
            return False
        self._patience.alive()
        return True
