"""Who did not arrive: judges the heartbeats of ranks, names the one that the others wait for, and says when it is too late.

A rank is silent when its line does not change (a stopped or dead process, a lost node) and stuck when its line changes and
nobody enters another phase. Naming is early and costs nothing; ending the job comes late. Clocks of other machines are not
compared: what counts is when a change was seen here.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from ssa_megatron.config.sections import Watchdog

GRACE = 2.5  # seconds beyond a heartbeat before a rank is named: a busy machine, a slow file system
UNLIMITED = ("restore", "save", "ended")  # they take as long as the disk does; collectives end by themselves
START = 540.0  # seconds before the first step is done: compilation. Collectives give up after 600


@dataclass
class News:
    said: list[str] = field(default_factory=list)
    verdict: str | None = None
    """Why the job must end now."""


class Watch:
    """One rank's view of `ranks`; `look` is called every heartbeat."""

    def __init__(self, ranks: Iterable[int], settings: Watchdog, *, everyone: bool = True):
        """everyone: whether `ranks` are all others, so that their standstill can be told from here too."""
        self.ranks, self._settings, self._everyone = tuple(ranks), settings, everyone
        self._looked: float | None = None
        self._seen: dict[int, tuple[int, float]] = {}
        """Rank -> (its beat, when that was first seen)."""
        self._last: dict[int, dict] = {}
        self._silent: set[int] = set()
        self._moved: tuple[tuple, float] = ((), 0.0)
        self._named_stuck = False

    def look(self, beats: dict[int, dict | None], own: dict, now: float, *, heard: bool) -> News:
        """beats: the newest line of each rank, None for none; own: the watcher's own.

        heard: whether the watcher could write its own line; if not, silence of others proves nothing.
        """
        news, settings = News(), self._settings
        # we were stopped ourselves (a suspended job), or the file system was: everybody gets a new chance
        asleep = self._looked is not None and now - self._looked > settings.heartbeat + GRACE
        self._looked = now
        for rank in self.ranks:
            beat = beats[rank]
            if beat is not None:
                self._last[rank] = beat
            count = beat["beat"] if beat is not None else self._seen.get(rank, (0, now))[0]
            if asleep or not heard or count != self._seen.get(rank, (None,))[0]:
                self._seen[rank] = (count, now)
        self._look_for_silence(news, now)
        if news.verdict is None and self._everyone:
            self._look_for_standstill(news, own, now, asleep)
        return news

    def _look_for_silence(self, news: News, now: float) -> None:
        for rank in self.ranks:
            last, quiet = self._last.get(rank), now - self._seen[rank][1]
            if last is not None and last["phase"] == "ended":
                continue
            who = f"rank {rank}" + (f" (pid {last['pid']} on {last['host']})" if last else "")
            where = (
                f"in {last['phase']} of step {last['step']}, at {last['at']}" if last else "before its first heartbeat"
            )
            if quiet > self._settings.silence:
                news.verdict = f"{who} has been silent for {quiet:.0f} s, {where}; ending the job so that it restarts"
            elif quiet > self._settings.heartbeat + GRACE and rank not in self._silent:
                self._silent.add(rank)
                left = self._settings.silence - quiet
                news.said.append(f"{who} has been silent for {quiet:.1f} s, {where}; the job ends in {left:.0f} s")
            elif quiet < self._settings.heartbeat and rank in self._silent:
                self._silent.discard(rank)
                news.said.append(f"{who} is back")

    def _look_for_standstill(self, news: News, own: dict, now: float, asleep: bool) -> None:
        everyone = [own, *(beat for rank, beat in sorted(self._last.items()) if rank in self.ranks)]
        marks = tuple(beat["marks"] for beat in everyone)
        if asleep or marks != self._moved[0]:
            self._moved, self._named_stuck = (marks, now), False
            return
        if not self._settings.stuck or any(beat["phase"] in UNLIMITED for beat in everyone):
            return
        still = now - self._moved[1]
        limit = max(self._settings.stuck, START if own["fresh"] else 0)
        if still > limit:
            news.verdict = (
                f"no rank has moved for {still:.0f} s; {culprits(everyone)}; ending the job so that it restarts"
            )
        elif still > limit / 5 and not self._named_stuck:
            self._named_stuck = True
            left = limit - still
            news.said.append(f"no rank has moved for {still:.0f} s; {culprits(everyone)}; the job ends in {left:.0f} s")


def culprits(everyone: list[dict]) -> str:
    """The ranks that the others wait for: those with the fewest phases behind them; or else those that wait for nobody."""
    fewest = min(beat["marks"] for beat in everyone)
    late = [beat for beat in everyone if beat["marks"] == fewest]
    if len(late) == len(everyone):
        late = [beat for beat in everyone if not beat["waits"]] or late
    where = f"{late[0]['phase']} of step {late[0]['step']}"
    names = ", ".join(str(beat["rank"]) for beat in late[:8]) + (", ..." if len(late) > 8 else "")
    if len(late) == len(everyone):
        return f"all are in {where}: their stacks tell more"
    return f"rank{'s' * (len(late) > 1)} {names} did not arrive: in {where}, {len(everyone) - len(late)} wait"
