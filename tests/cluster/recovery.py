"""How long a run stands still: from SIGKILL to a rank until the next optimizer step of the restarted run, two CPU ranks.

python -m tests.cluster.recovery [KILLS]: each kill and the median, as JSON; imports, restore and repeated steps included.
The first start's time to its first step stands beside it: on a machine that others keep busy, both grow alike.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ssa_megatron.train.metrics import read_metrics
from tests import launch

OVERRIDES = ("train.steps=100000", "checkpoint.interval=5", "train.eval_interval=0", "logging.tensorboard=false")


def measure(folder: Path, kills: int) -> dict:
    """`cold`: seconds from the launch to its first step. `kills`: a dict each: seconds to the restarted run's first step
    (`next_step`), and to the first step that the killed one had not done (`new_step`).
    """
    import ssa_pipelines

    tokenizer = ssa_pipelines.train_tokenizer("package:king-james", folder / "tokenizer.model", vocab_size=2048)
    ssa_pipelines.prepare("package:king-james", tokenizer, folder / "data", row_length=512, validation_fraction=0.05)
    run = folder / "run"
    command = [sys.executable, "-m", "ssa_cluster.launch", "--nproc-per-node", "2", "train", "demo", *OVERRIDES]
    command += [f"data.path={folder / 'data'}", "--run-folder", str(run)]
    log = (folder / "log").open("w")
    began = time.monotonic()
    process = subprocess.Popen(command, cwd=launch.ROOT, env=launch.environment(), stdout=log, stderr=log)
    found = []
    try:
        _wait(run, lambda steps: steps, process)
        cold = round(time.monotonic() - began, 2)
        for number in range(kills):
            reached = _wait(run, lambda steps, n=number: steps and steps[-1] % 5 == 2 and steps[-1] > 5 * n, process)
            ranks = [p for p in psutil.Process(process.pid).children() if p.is_running()]
            ranks[number % 2].kill()
            killed = time.monotonic()
            _wait(run, lambda steps, last=reached[-1]: steps and steps[-1] < last, process)  # metrics.jsonl is cut back
            restored = read_metrics(run / "metrics.jsonl")[-1]["step"]
            _wait(run, lambda steps, last=restored: steps and steps[-1] > last, process)
            first = time.monotonic() - killed
            _wait(run, lambda steps, last=reached[-1]: steps and steps[-1] > last, process)
            found.append({"next_step": round(first, 2), "new_step": round(time.monotonic() - killed, 2)})
    finally:
        launch.kill(process)
        log.close()
    return {"cold": cold, "kills": found, "median_next_step": statistics.median(k["next_step"] for k in found)}


def _wait(run: Path, condition, process: subprocess.Popen, timeout: float = 180) -> list[int]:
    deadline = time.monotonic() + timeout
    while True:
        path = run / "metrics.jsonl"
        steps = [line["step"] for line in read_metrics(path, skip_damaged=True)] if path.exists() else []
        if condition(steps):
            return steps
        assert process.poll() is None, (run.parent / "log").read_text()
        assert time.monotonic() < deadline, (run.parent / "log").read_text()
        time.sleep(0.02)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        found = measure(Path(place), int(sys.argv[1]) if len(sys.argv) > 1 else 5)
    print(json.dumps({**found, "cores": os.cpu_count(), "load": os.getloadavg()[0]}))
