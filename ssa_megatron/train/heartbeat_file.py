"""The files of heartbeats: RUN/heartbeats/rank-00017.json, one line a rank, written over in place. Imports no torch.

A line has: start (of this job), rank, host, pid, time, beat (how many before it), step, fresh (no step is done yet), phase,
marks (phases entered), seconds (in this phase), at (innermost line of ours), waits (for other ranks), stop (who asked for the
end), verdict (why the job ends at once), exit (code the rank ends with).
"""

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

NUMBER, WORDS = int | float, str | None
FIELDS = {"start": str, "rank": int, "host": str, "pid": int, "time": NUMBER, "beat": int, "step": int, "fresh": bool}
FIELDS |= {"phase": str, "marks": int, "seconds": NUMBER, "at": str, "waits": bool, "stop": WORDS, "verdict": WORDS}
FIELDS |= {"exit": int | None}
WIDTH = 1024  # bytes of a line: one written over another leaves nothing of it, and takes no new block of a full disk


def clear(run: Path) -> str:
    """Forget an earlier start; returns this one's name."""
    shutil.rmtree(run / "heartbeats", ignore_errors=True)
    with contextlib.suppress(OSError):  # then no rank can write, and none is accused
        (run / "heartbeats").mkdir(parents=True, exist_ok=True)
        (run / "logs").mkdir(exist_ok=True)  # for stacks, and for what NCCL's watchdog dumps, which makes no folder
    return f"{time.time():.6f}"


def write(run: Path, line: dict) -> bool:
    """Whether that was possible."""
    data = json.dumps(line).encode().ljust(WIDTH - 1) + b"\n"
    try:  # opened each time: on a network file system others see what is closed
        handle = os.open(_path(run, line["rank"]), os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, data, 0)
            os.ftruncate(handle, len(data))  # after one that was longer
        finally:
            os.close(handle)
    except OSError:
        return False
    return True


def read(run: Path, rank: int) -> dict | None:
    """A rank's newest line; None when there is none, it is being written, or it is somebody else's."""
    try:
        beat = json.loads(_path(run, rank).read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(beat, dict) or not beat.keys() >= FIELDS.keys():
        return None
    return beat if all(isinstance(beat[name], kind) for name, kind in FIELDS.items()) else None


def read_all(run: Path) -> list[dict]:
    """The newest line of every rank that has one, in rank order."""
    names = (path.stem.removeprefix("rank-") for path in (run / "heartbeats").glob("rank-*.json"))
    ranks = sorted(int(name) for name in names if name.isdecimal())
    return [beat for rank in ranks if (beat := read(run, rank))]


def _path(run: Path, rank: int) -> Path:
    return run / "heartbeats" / f"rank-{rank:05d}.json"
