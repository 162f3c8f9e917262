"""One function over many tasks, on several processes or in this one; results come as they are ready.

No process outlives the one that began it: a worker whose parent dies, however, ends at once. It refuses to wait for a
worker that was killed: that is an error, not a hang.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ssa_pipelines.errors import DatasetError

Task, Result = TypeVar("Task"), TypeVar("Result")
_AHEAD = 2  # tasks handed out for each process


def map_unordered(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int, *, preload: tuple[str, ...]
) -> Iterator[Result]:
    """Yields function(task) of every task; an error of the function is raised here.

    processes: 1 runs in this process. Several are forked from a server that has imported the modules `preload` and holds
        no threads, so that starting one costs milliseconds and inherits no lock.
    Raises DatasetError when a worker was killed.
    """
    if processes <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_die_with_the_parent)
    try:
        tasks, running = iter(tasks), set()
        while True:
            while len(running) < _AHEAD * processes and (task := next(tasks, None)) is not None:
                running.add(pool.submit(function, task))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise DatasetError(
            "a worker process was killed (often: memory ran out)",
            remedy="give the same command with fewer workers; what is finished is kept",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _die_with_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops us

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
