"""Worker: what signs of life cost, in a process of its own: a phase in the training thread, and a beat in the heartbeat's.

usage: python -m tests.workers.heartbeat_cost [RANKS]     (the folder is on the disk of the system's temporary files)
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from ssa_megatron.config.sections import Watchdog
from ssa_megatron.train import heartbeat_file
from ssa_megatron.train.heartbeat import Heartbeat
from ssa_megatron.train.signals import StopRequest


def seconds_of(work, calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - began) / calls


def main() -> None:
    ranks = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        alone = {"world": ranks, "run_on_rank0": lambda action: action()}
        watcher = Heartbeat(run, SimpleNamespace(rank=0, is_rank0=True, **alone), StopRequest(), Watchdog())
        others = [
            Heartbeat(run, SimpleNamespace(rank=rank, is_rank0=False, world=ranks, run_on_rank0=lambda _: watcher._start),
                      StopRequest(), Watchdog())
            for rank in range(1, ranks)
        ]  # fmt: skip
        found = {
            "ranks": ranks,
            "phase_us": 1e6 * seconds_of(lambda: watcher.phase("compute", 7), 100_000),
            "beat_us": 1e6 * seconds_of(watcher._beat, 200),
        }
        for other in others:
            other._beat()
        assert len(heartbeat_file.read_all(run)) == ranks
        found["watch_ms"] = 1e3 * seconds_of(lambda: watcher._listen(True), 5)
        found["listen_us"] = 1e6 * seconds_of(lambda: others[0]._listen(True), 200)
        print(json.dumps(found))


if __name__ == "__main__":
    main()
