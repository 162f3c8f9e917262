"""Worker: reads the stream as one of two ranks, in several layouts, then on and on until it is killed.

usage: python -m tests.pipelines.worker DATA OUT
Writes OUT/cases-RANK.json (digests of micro-batches by layout), then keeps OUT/rank-RANK.json: pid, position and
shared memory.
"""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

from tests.pipelines.support import stream, take


def digests(micro_batches) -> list[str]:
    return [
        hashlib.sha256(r.tokens.numpy().tobytes() + r.doc_starts.numpy().tobytes()).hexdigest() for r in micro_batches
    ]


def cases(data: str, rank: int) -> dict[str, list[str]]:
    data_parallel, tensor_parallel = stream(data, rank=rank, size=2), stream(data, rank=0, size=1)
    found = {"dp": digests(take(data_parallel, 90)), "tp": digests(take(tensor_parallel, 90))}
    state = [data_parallel.state_dict()]
    dist.broadcast_object_list(state)  # as from a checkpoint: every rank loads what rank 0 saved
    data_parallel, tensor_parallel = stream(data, rank=rank, size=2), stream(data, rank=0, size=1)
    data_parallel.load_state_dict(state[0])
    tensor_parallel.load_state_dict(state[0])
    return {**found, "dp resumed": digests(take(data_parallel, 30)), "dp to tp": digests(take(tensor_parallel, 30))}


def write(out: Path, record) -> None:
    temporary = out.with_suffix(".tmp")
    temporary.write_text(json.dumps(record))
    os.replace(temporary, out)


if __name__ == "__main__":
    data, folder = sys.argv[1:]
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    write(Path(folder, f"cases-{rank}.json"), cases(data, rank))
    rows = stream(data, rank=rank, size=2)
    while True:
        next(rows)
        time.sleep(0.01)
        if rows.samples_seen % 40 == 0:
            maps = Path("/proc/self/maps").read_text().splitlines()
            shared = sorted({line.split()[-1] for line in maps if "/dev/shm/" in line})
            write(Path(folder, f"rank-{rank}.json"), {"pid": os.getpid(), "state": rows.state_dict(), "shared": shared})
