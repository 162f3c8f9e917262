"""Calls made by daemon threads, in order. The caller waits for a result with a limit.

A thread that hangs (a dead file system, a silent server) cannot be stopped and must not keep the process alive. So the
threads are daemons, and the caller raises an error instead.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any


class DaemonPool:
    """Like ThreadPoolExecutor, but nothing waits for its threads when the process ends."""

    def __init__(self, threads: int, name: str):
        self._calls: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name=f"{name}-{n}", daemon=True) for n in range(threads)]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """The future result of function(*arguments)."""
        future: Future = Future()
        self._calls.put((future, function, arguments))
        return future

    def close(self, seconds: float) -> None:
        """Ends the threads after the calls submitted so far; waits at most this long per thread."""
        for _ in self._threads:
            self._calls.put(None)
        for thread in self._threads:
            thread.join(seconds)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del call, future, arguments


def start(function: Callable, *arguments: Any) -> Future:
    """The future result of function(*arguments), called by a separate daemon thread, which may hang for ever."""
    pool = DaemonPool(1, "call")
    future = pool.submit(function, *arguments)
    pool.close(0)
    return future
