"""A TCP relay before a server on the loopback interface: it can fall silent, slow down, break off or be gone."""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager


class Relay:
    """Passes connections on to a port, as its attributes say at the moment.

    silent: takes connections and bytes and passes nothing on. rate: bytes a second of each answer. first: bytes of each
    connection's answers that are passed on, after which it is silent; None is no limit. `gone` refuses connections and
    breaks the ones there are; `back` takes them again, on the same port.
    """

    def __init__(self, port: int):
        self._target, self._port, self._listener = port, 0, None
        self.silent, self.rate, self.first = False, None, None
        self._open: set[socket.socket] = set()
        self.back()
        self.url = f"http://127.0.0.1:{self._port}"

    def back(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self._port), backlog=64)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def gone(self) -> None:
        with contextlib.suppress(OSError):  # gone already
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._pass_on, args=(client,), daemon=True).start()

    def _pass_on(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server, contextlib.suppress(OSError):
            ends = {client: server, server: client}
            self._open |= ends.keys()
            answered = 0
            while True:
                for end in select.select([*ends], [], [], 0.1)[0]:
                    data = end.recv(1 << 14)
                    while self.silent or (end is server and self.first is not None and answered >= self.first):
                        time.sleep(0.05)
                    if not data:
                        return
                    ends[end].sendall(data)
                    if end is server:
                        answered += len(data)
                        time.sleep(len(data) / self.rate if self.rate else 0)


@contextmanager
def relayed(store) -> Iterator[Relay]:
    """A relay before an ObjectStore, and the environment in which it is used in the store's place."""
    from tests.pipelines.object_store import credentials

    relay = Relay(store.port)
    try:
        with credentials(relay.url):
            yield relay
    finally:
        relay.silent = relay.first = None
        relay.gone()
