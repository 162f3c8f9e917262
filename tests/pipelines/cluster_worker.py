"""Worker: simulated nodes of ranks that stream one dataset and write down what each step saw, until killed or done.

usage: python -m tests.pipelines.cluster_worker JOB.json
JOB: {"url", "folder", "runs": {NAME: [{"dp", "tp", "pp", "steps", "kill_after"}, ...]}}. Libraries are imported once and
every rank of every attempt is a forked process; each node has a cache, a temporary folder and, where the kernel allows
it, a /dev/shm of its own. An attempt goes on from the position committed last. With `kill_after` all ranks get SIGKILL
that many seconds after the first step of the attempt.
"""

import ctypes
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

import ssa_pipelines
from tests.pipelines.support import stream
from tests.pipelines.worker import digests, write

BATCH = 16  # rows in a step
MICRO = 2
CHECKPOINT_STEPS = 3
NODES = 2
_CLONE_NEWNS = 0x20000


def rank_main(job: dict, attempt: dict, rank: int, done: memoryview) -> None:
    """Rank (dp, pp, tp), the last fastest, as megatron-core lays them out; writes a line a micro-batch."""
    folder = Path(job["folder"])
    dp, rest = divmod(rank, attempt["pp"] * attempt["tp"])
    world = attempt["dp"] * attempt["pp"] * attempt["tp"]
    node = folder / f"node-{rank * NODES // world}"
    own_node(node)
    access = ssa_pipelines.Access(cache=node / "cache", stall_timeout=60)
    rows = stream(job["url"], rank=dp, size=attempt["dp"], micro=MICRO, batch=BATCH, access=access)
    state = folder / "state.json"
    if state.exists():
        rows.load_state_dict(json.loads(state.read_text()))
    with open(folder / f"seen-{dp}-{rest}.jsonl", "a") as seen:
        while rows.samples_seen < attempt["steps"] * BATCH:
            step = rows.samples_seen // BATCH
            first = rows.samples_seen + dp * MICRO
            [digest] = digests([next(rows)])
            seen.write(json.dumps({"step": step, "first": first, "digest": digest}) + "\n")
            seen.flush()
            time.sleep(0.005)
            if rows.samples_seen % BATCH == 0:
                done[rank] = step + 1
            last = rows.samples_seen == attempt["steps"] * BATCH
            if rank == 0 and (last or rows.samples_seen % (CHECKPOINT_STEPS * BATCH) == 0):
                while min(done) < step + 1:  # a step is over when it is on every rank
                    time.sleep(0.001)
                write(state, rows.state_dict())
    maps = Path("/proc/self/maps").read_text()
    assert "/dev/shm/" not in maps


def own_node(node: Path) -> None:
    (node / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(node / "tmp")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) == 0:
        libc.mount(b"none", b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE
        libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)


def run_attempt(job: dict, attempt: dict) -> list[int]:
    """Forks all ranks; returns their wait statuses."""
    folder, pids = Path(job["folder"]), []
    world = attempt["dp"] * attempt["pp"] * attempt["tp"]
    done = memoryview(mmap.mmap(-1, 8 * world)).cast("q")  # steps done by each rank
    lines = sum(path.stat().st_size for path in folder.glob("seen-*.jsonl"))
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                rank_main(job, attempt, rank, done)
                code = 0
            except BaseException as error:
                print(f"rank {rank}: {type(error).__name__}: {error}", flush=True)
            finally:
                os._exit(code)
        pids.append(pid)
    if attempt.get("kill_after") is not None:
        end = time.monotonic() + 60
        while sum(path.stat().st_size for path in folder.glob("seen-*.jsonl")) == lines and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(attempt["kill_after"])
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import streaming.base.format  # noqa: F401 (here, so that no rank has to)
    import torch

    torch.set_num_threads(1)
    for name, attempts in job["runs"].items():
        run = {**job, "folder": str(Path(job["folder"], name))}
        Path(run["folder"]).mkdir()
        codes = [run_attempt(run, attempt) for attempt in attempts]
        write(Path(run["folder"], "codes.json"), codes)


if __name__ == "__main__":
    main()
