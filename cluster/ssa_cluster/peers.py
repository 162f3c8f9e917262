"""Who is still there: heartbeats between the nodes of a launch, over the rendezvous store, and the code the launch ends with.

torchrun notices a rank that died; it does not notice a node that fell silent (link cut, power gone), and a call to its store can
block for minutes. Here a thread beats and listens, and the agent's loop only ever reads what the thread found: a silent node is
named within `silence` seconds, on the first node by its missing beats, elsewhere by the store that stopped answering.
"""

import contextlib
import threading
import time
from datetime import timedelta

from torch.distributed import DistError, PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo
from torch.distributed.elastic.rendezvous.api import RendezvousError

from ssa_cluster.exit_codes import say

BEAT = 1.0  # seconds between two heartbeats


class Lost(Exception):
    """The rendezvous host has not answered this node."""


class Peers(threading.Thread):
    """The nodes of one rendezvous round, as seen from node `rank` of `size`."""

    def __init__(self, handler: RendezvousHandler, store: Store, *, name: str, rank: int, size: int, silence: float):
        """`store`: a connection that nobody else uses, under a prefix of this round. `name`: what others call this node."""
        super().__init__(name="peers", daemon=True)
        self._handler, self._store, self._own, self._rank, self._size = handler, store, name, rank, size
        self._silence, self._over = silence, threading.Event()
        self._answered = time.monotonic()
        self._waiting = 0
        self._verdict: int | None = None
        self._silent: str | None = None
        self._crash: str | None = None
        self._wanted: int | None = None
        self._crashed: str | None = None

    def run(self) -> None:
        beat = 0
        seen: dict[int, tuple[bytes, float]] = {}
        while not self._over.wait(BEAT if beat else 0):
            beat += 1
            with contextlib.suppress(
                DistError, RendezvousError, RuntimeError, ValueError
            ):  # tried again; who gives up is the reader
                self._store.set(f"beat/{self._rank}", f"{beat} {self._own}")
                if self._wanted is not None:
                    self._store.compare_set("verdict", "", str(self._wanted))
                if self._crashed is not None:
                    self._store.set("crash", self._crashed)
                if self._store.check(["verdict"]):
                    self._verdict = int(self._store.get("verdict"))
                elif self._store.check(["crash"]):
                    self._crash = self._store.get("crash").decode()
                if self._rank == 0:
                    self._silent = self._look(seen)
                self._waiting = self._handler.num_nodes_waiting()
                self._answered = time.monotonic()

    def _look(self, seen: dict[int, tuple[bytes, float]]) -> str | None:
        now = time.monotonic()
        for other in range(1, self._size):
            key = f"beat/{other}"
            found = self._store.get(key) if self._store.check([key]) else b""
            before, since = seen.setdefault(other, (found, now))
            if found != before:
                seen[other] = (found, now)
            elif now - since > self._silence:
                name = found.decode().partition(" ")[2] or "which never spoke"
                return f"node {other} of {self._size} ({name}) has been silent for {now - since:.0f} s"
        return None

    @property
    def waiting(self) -> int:
        """Nodes that want to join. Raises Lost when the rendezvous host is the one that is silent."""
        quiet = time.monotonic() - self._answered
        if quiet > self._silence:
            raise Lost(f"the rendezvous host has not answered this node ({self._own}) for {quiet:.0f} s")
        return self._waiting

    @property
    def silent(self) -> str | None:
        """A sentence that names the node that fell silent; only the first node of the round knows."""
        return self._silent

    @property
    def verdict(self) -> int | None:
        """The exit code that some node's ranks gave and no restart can change."""
        return self._verdict

    @property
    def crash(self) -> str | None:
        """What crashed on some node, which will restart: the ranks of the others wait for it in vain."""
        return self._crash

    def tell(self, crash: str) -> None:
        """Ranks crashed here, and will restart. Returns at once; the others know a beat later."""
        self._crashed = crash

    def decide(self, code: int, *, patience: float = 3.0) -> None:
        """Publish a verdict; the first one stands."""
        self._wanted = code
        deadline = time.monotonic() + patience
        while self._verdict is None and self.is_alive() and time.monotonic() < deadline:
            time.sleep(0.05)

    def stop(self) -> None:
        self._over.set()


class WatchedRendezvous(RendezvousHandler):
    """A rendezvous handler whose rounds are watched by Peers, and whose `num_nodes_waiting` never blocks."""

    def __init__(self, inner: RendezvousHandler, *, host: str, port: int, hosting: bool, name: str, silence: float):
        self._hosting = hosting
        self._inner, self._host, self._port, self.name, self._silence = inner, host, port, name, silence
        self._peers: Peers | None = None

    @property
    def peers(self) -> Peers:
        """The nodes of the current round; there is one from `next_rendezvous` on."""
        assert self._peers is not None
        return self._peers

    def next_rendezvous(self) -> RendezvousInfo:
        if self._peers is not None:
            self._peers.stop()
        info = self._inner.next_rendezvous()
        own = TCPStore(self._host, self._port, is_master=False, timeout=timedelta(seconds=self._silence))
        if info.rank == 0:
            info.store.set("peers", f"{self.name}/{time.time()}")
        round_name = info.store.get("peers").decode()  # the same on all nodes of this round, and never seen before
        self._peers = Peers(
            self._inner,
            PrefixStore(f"peers/{round_name}", own),
            name=self.name,
            rank=info.rank,
            size=info.world_size,
            silence=self._silence,
        )
        self._peers.start()
        return info

    def num_nodes_waiting(self) -> int:
        try:
            waiting = self._peers.waiting if self._peers else 0
        except Lost:
            if self._hosting:  # it would be this process, which is busy
                return 0
            raise
        if waiting:
            say(f"{waiting} node(s) want to join: the ranks stop and all start together")
        return waiting

    def get_backend(self) -> str:
        return self._inner.get_backend()

    @property
    def use_agent_store(self) -> bool:
        return self._inner.use_agent_store

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        if self._peers is not None:
            self._peers.stop()
        return self._inner.shutdown() if self._hosting else True  # its host closes it, and may be gone already
