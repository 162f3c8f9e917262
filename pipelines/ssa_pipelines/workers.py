"""Maps one function over many tasks, on several processes or in this one; results come as they are ready.

A worker exits as soon as its parent is gone, also after SIGKILL. A worker that was killed is an error, not a hang.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from ssa_pipelines.errors import DatasetError

Task = TypeVar("Task")
Result = TypeVar("Result")
_AHEAD = 2  # tasks submitted per process


def map_unordered(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int, *, preload: tuple[str, ...]
) -> Iterator[Result]:
    """Yields function(task) for every task; an error of the function is raised here.

    processes: 1 runs in this process. Several are forked from a server that has imported the modules `preload` and has no
        threads, so starting one costs milliseconds and inherits no lock.
    Raises DatasetError when a worker was killed.
    """
    if processes <= 1:
        yield from map(function, tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_exit_with_the_parent)
    try:
        waiting, running = iter(tasks), set[Future[Result]]()
        while True:
            while len(running) < _AHEAD * processes and (task := next(waiting, None)) is not None:
                running.add(pool.submit(function, task))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        raise DatasetError(
            "a worker process was killed (often: memory ran out)",
            remedy="run the same command with fewer workers; finished parts are kept",
            id="worker-killed",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _exit_with_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C also reaches the parent, which stops its workers

    def watch() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
