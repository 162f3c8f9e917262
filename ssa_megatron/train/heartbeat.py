"""A rank's sign of life: one line in RUN/heartbeats/ every second, with step and phase, by a thread of its own.

Training sets a few attributes a phase and touches no file. The same thread carries news the other way: a stop asked of
another rank, the watchdog's verdict, a request for a profile. What cannot be written is not sent, and training goes on.
"""

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

from ssa_megatron.config.sections import Watchdog
from ssa_megatron.errors import EXIT_HUNG
from ssa_megatron.parallel.state import ParallelState
from ssa_megatron.train import heartbeat_file, profile_request, prometheus
from ssa_megatron.train.signals import StopRequest
from ssa_megatron.train.watchdog import Watch

log = logging.getLogger("ssa.watchdog")
EXPOSITION = 15.0  # seconds between two versions of metrics.prom


class Heartbeat:
    """A context manager around a run, on every rank; the first rank watches all others, the last one watches the first."""

    def __init__(self, run: Path, parallel: ParallelState, stop: StopRequest, settings: Watchdog):
        self._run, self._parallel, self._stop, self._settings = run, parallel, stop, settings
        # rank 0's clock names this start: what earlier ones left behind is not news
        self._start = parallel.run_on_rank0(lambda: heartbeat_file.clear(run))
        last = parallel.world_size - 1
        watched = {0: range(1, parallel.world_size), last: range(1)}.get(parallel.rank, ()) if last else ()
        self._watch = Watch(watched, settings, everyone=parallel.is_rank0) if watched else None
        self._spokesmen = sorted({0, last} - {parallel.rank})
        self._phase, self._step, self._marks, self._since = "build", 0, 0, time.monotonic()
        self._first = 0
        self._beats = 0
        self._verdict: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self.exit_code: int | None = None
        """What the process is about to end with."""
        self._values: dict | None = None
        self.asked = range(0)
        """Steps that `ssa profile` asks for; on the writer rank."""

    @property
    def values(self) -> dict | None:
        """The newest figure of each name in metrics.jsonl, for metrics.prom: an evaluation's are in one line of many."""
        return self._values

    @values.setter
    def values(self, line: dict) -> None:
        """The writer rank's newest line."""
        self._values = (self._values or {}) | line

    def phase(self, name: str, step: int) -> None:
        """The main thread enters phase `name` of `step`, counted from 1."""
        self._phase, self._step, self._since = name, step, time.monotonic()
        self._first = self._first or step
        self._marks += 1

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, _kind, error, _traceback) -> None:
        if error is not None:
            self.exit_code = getattr(error, "exit_code", 1)
        self._closed.set()
        self._thread.join(5)
        self.phase("ended", self._step)
        self._beat()

    def _work(self) -> None:
        exposed = -EXPOSITION
        while True:
            sent = self._beat()
            self._listen(sent)
            if self._parallel.is_rank0:
                self.asked = self.asked or profile_request.take(self._run)
                if self.values is not None and time.monotonic() - exposed >= EXPOSITION:
                    exposed = time.monotonic()
                    prometheus.write(self._run, self.values)
            if self._closed.wait(self._settings.heartbeat):
                break
        if self._parallel.is_rank0 and self.values is not None:
            prometheus.write(self._run, self.values)

    def _beat(self) -> bool:
        """Write this rank's line; whether that was possible."""
        self._beats += 1
        return heartbeat_file.write(self._run, self._facts())

    def _facts(self) -> dict:
        at, waits = _whereabouts()
        return {
            "start": self._start,
            "rank": self._parallel.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "time": round(time.time(), 3),
            "beat": self._beats,
            "step": self._step,
            "fresh": self._step <= self._first,  # no step is done since this start
            "phase": self._phase,
            "marks": self._marks,
            "seconds": round(time.monotonic() - self._since, 1),
            "at": at,
            "waits": waits,
            "stop": self._stop.reason,
            "verdict": self._verdict,
            "exit": self.exit_code,
        }

    def _listen(self, sent: bool) -> None:
        """What the spokesmen (first and last rank) say holds for all; the one who watches decides first."""
        if self._watch is not None:
            heard = {rank: self._read(rank) for rank in self._watch.ranks}
            news = self._watch.look(heard, self._facts(), time.monotonic(), heard=sent)
            for text in news.said:
                log.warning(text)
            for beat in heard.values():
                if beat and beat["stop"] and beat["phase"] != "ended":
                    self._stop.ask(_of_rank(beat))
            if news.verdict:
                self._verdict = news.verdict
                self._beat()
                self._leave(wait=2 * self._settings.heartbeat)  # for all to read it before the launcher ends them
        for rank in self._spokesmen:
            beat = self._read(rank)
            if beat and beat["verdict"]:
                self._verdict = beat["verdict"]
                self._leave(wait=0)
            if beat and beat["stop"] and beat["phase"] != "ended":
                self._stop.ask(_of_rank(beat))

    def _read(self, rank: int) -> dict | None:
        beat = heartbeat_file.read(self._run, rank)
        return beat if beat and beat["start"] == self._start else None

    def _leave(self, *, wait: float) -> None:
        """Every thread's Python stack into logs/, then the end, without the main thread: it is what hangs."""
        try:
            (self._run / "logs").mkdir(exist_ok=True)
            with (self._run / "logs" / f"stacks-rank-{self._parallel.rank:05d}.txt").open("w") as file:
                who = f"rank {self._parallel.rank}, pid {os.getpid()} on {socket.gethostname()}"
                file.write(f"{self._verdict}\n{who}, in {self._phase} of step {self._step}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as problem:
            log.warning("no stacks of rank %d: %s", self._parallel.rank, problem)
        if wait:
            log.error("%s\n  stacks of all ranks: %s", self._verdict, self._run / "logs")
        time.sleep(wait)
        self.exit_code = EXIT_HUNG
        self._beat()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_HUNG)


def _of_rank(beat: dict) -> str:
    return beat["stop"] if " of rank " in beat["stop"] else f"{beat['stop']} of rank {beat['rank']}"


def _whereabouts() -> tuple[str, bool]:
    """Innermost line of ours that the main thread is in, and whether it waits for other ranks."""
    frame, ours, waits = sys._current_frames().get(threading.main_thread().ident or 0), None, False
    while frame is not None:
        path = frame.f_code.co_filename
        waits = waits or "torch/distributed" in path
        if ours is None and any(part in path for part in ("ssa_megatron/", "ssa_pipelines/", "ssa_kernels/")):
            ours = f"{'/'.join(path.rsplit('/', 2)[-2:])}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return ours or "?", waits
