"""torchrun's elastic agent, with the endings of this project.

Stock torchrun turns every failure into exit code 1, restarts ranks that have asked to be stopped, and answers a signal by ending
itself before the other nodes are told. This one forwards a signal to its ranks and goes on watching them, so that a stop looks
the same whichever process was asked; ends with the code the ranks agreed on (endings.py); restarts after a crash while there is
progress; and names a node that fell silent (peers.py).
"""

import contextlib
import os
import signal
import sys
import time

from torch.distributed import DistStoreError
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsSpecs
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

from ssa_cluster.exit_codes import FORWARDED, START_AGAIN, Interrupted, RestartBudget, describe, ending, say
from ssa_cluster.peers import BEAT, Lost, WatchedRendezvous

ECHO = 5.0  # seconds in which a second signal is the first one heard twice: srun, scancel and a terminal signal whole groups
TIDY = 10.0  # seconds between the first rank's orderly end and SIGKILL to those that have not ended
CRASH = 2.0  # the same after a crash: the others wait in a collective for a rank that will never come
ATTEMPTS = 5  # to meet


class Agent(LocalElasticAgent):
    """One node's ranks. `run()` returns a RunResult whose return_values are the launch's exit code, for every rank here."""

    def __init__(
        self, spec: WorkerSpec, logs: LogsSpecs, rendezvous: WatchedRendezvous, budget: RestartBudget, *, grace: float
    ):
        """grace: seconds the ranks get after a signal to commit a checkpoint."""
        super().__init__(spec, logs, exit_barrier_timeout=60)
        self._rendezvous_watched, self._budget, self._grace = rendezvous, budget, grace
        self._asked: tuple[int, float] | None = None
        self._ended_at: float | None = None
        self._told_at: float | None = None
        self._starting = self._over = self._passed_on = False
        self.killed_by: int | None = None
        """The signal that, given a second time, ended the ranks at once."""

    @property
    def asked(self) -> bool:
        """Whether a signal has asked for the end."""
        return self._asked is not None

    def listen(self) -> None:
        """Take the signals that schedulers and people send; those torchrun would die of included."""
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        for number in FORWARDED:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._asked is None:
            self._asked = (number, now)
            if self._starting or self._over:
                return
            if not self._running():
                raise Interrupted(f"{name} while no rank was running")
            self._ask(number)
        elif number == self._asked[0] and now - self._asked[1] > ECHO and self._running():
            self.killed_by = number
            say(f"{name} again: the ranks are killed; the last committed checkpoint stands")
            self._signal(signal.SIGKILL)

    def _ask(self, number: int) -> None:
        say(f"{signal.Signals(number).name}: {len(self._running())} rank(s) asked to stop within {self._grace:.0f} s")
        # They may have got this very signal too, and a second one of a kind ends them at once: send another kind.
        self._signal(signal.SIGUSR2 if number == signal.SIGUSR1 else signal.SIGUSR1)

    def _pass_on(self) -> None:
        """Once a start: a rank that was asked before it had met the others has ended alone, and they know nothing of it."""
        if not self._passed_on:
            self._passed_on = True
            self._signal(signal.SIGUSR1)

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        for left in reversed(range(ATTEMPTS)):
            try:
                return super()._rendezvous(worker_group)
            except DistStoreError as problem:  # a node of this round was lost between joining and being given its ranks
                if not left:
                    raise
                say(f"a node was lost while meeting ({str(problem).splitlines()[0]}); meeting again")

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, int]:
        self._ended_at = self._told_at = None
        self._passed_on = False
        self._starting = True  # a signal now finds ranks that nobody has a list of yet
        try:
            return super()._start_workers(worker_group)
        finally:
            self._starting = False
            if self._asked:
                self._ask(self._asked[0])

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        now = time.monotonic()
        codes = self._codes()
        if any(code for code in codes.values()) and None in codes.values():
            self._ended_at = self._ended_at or now
            said = ending(code for code in codes.values() if code is not None)
            if said == START_AGAIN:
                self._pass_on()
            if now - self._ended_at < (CRASH if said is None else TIDY):
                return RunResult(state=WorkerState.HEALTHY)
            self._signal(signal.SIGKILL)
        if self._asked and self._running() and now - self._asked[1] > self._grace:
            say(
                f"the ranks did not stop within {self._grace:.0f} s and are killed; the last committed checkpoint stands"
            )
            self._signal(signal.SIGKILL)
        result = super()._monitor_workers(worker_group)
        peers = self._rendezvous_watched.peers
        if result.state == WorkerState.SUCCEEDED:
            self._over = True
        if result.state == WorkerState.FAILED:
            return self._after_failure(result, worker_group)
        if result.state == WorkerState.HEALTHY and (peers.silent or peers.crash) and not self._asked:
            say(f"{peers.silent}: restarting without it" if peers.silent else f"{peers.crash}: restarting with it")
            self._signal(signal.SIGKILL)
            return RunResult(state=WorkerState.UNHEALTHY)
        if result.state == WorkerState.HEALTHY and peers.verdict is not None:
            self._told_at = self._told_at or now
            if peers.verdict == START_AGAIN:
                self._pass_on()
            if now - self._told_at > TIDY:
                self._signal(signal.SIGKILL)
                return self._finished(worker_group, peers.verdict)
        return result

    def _after_failure(self, result: RunResult, worker_group: WorkerGroup) -> RunResult:
        peers, several = self._rendezvous_watched.peers, (worker_group.group_world_size or 1) > 1
        self._ended_at = self._ended_at or time.monotonic()
        failures = sorted(result.failures.items(), key=lambda item: item[1].timestamp)
        code = ending(failure.exitcode for _, failure in failures)
        if code is None and self._asked:
            code = START_AGAIN
        if code is None and peers.verdict is None and several:
            time.sleep(CRASH)  # a rank that lost its connection often did so because another node has just given up
        if code is None:
            code = peers.verdict
        if code is None:
            rank, first = next(((r, f) for r, f in failures if f.exitcode != -signal.SIGKILL), failures[0])
            what = f"rank {rank} on {self._rendezvous_watched.name}: {describe(first.exitcode)}"
            if self._budget.spend():
                say(f"{what}; restarting from the last committed checkpoint")
                peers.tell(what)
                if several:
                    time.sleep(2 * BEAT)  # before this node joins anew, or the others would take it for a new one
                return result
            say(f"{what}; no restart: {self._budget.limit} in a row brought no newer checkpoint")
            code = first.exitcode if first.exitcode > 0 else 128 - first.exitcode
        peers.decide(code)
        return self._finished(worker_group, peers.verdict if peers.verdict is not None else code)

    def _finished(self, worker_group: WorkerGroup, code: int) -> RunResult:
        self._over = True
        values = {worker.global_rank: code for worker in worker_group.workers}
        return RunResult(state=WorkerState.SUCCEEDED, return_values=values)

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int = 30) -> None:
        if isinstance(sys.exc_info()[1], Lost):
            self._signal(signal.SIGKILL)  # they wait for nodes that cannot be reached
        super()._shutdown(death_sig, max(timeout, int(self._grace)))  # nodes that join may cost a checkpoint's time

    def _codes(self) -> dict[int, int | None]:
        return {rank: handler.proc.poll() for rank, handler in self._handlers().items()}

    def _handlers(self) -> dict[int, SubprocessHandler]:
        context = self._pcontext
        return context.subprocess_handlers if isinstance(context, SubprocessContext) else {}

    def _running(self) -> list[int]:
        return [rank for rank, code in self._codes().items() if code is None]

    def _signal(self, number: int) -> None:
        for rank in self._running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._handlers()[rank].proc.pid, number)  # torchrun makes each rank a session of its own
