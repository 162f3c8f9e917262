"""Worker: what a checkpoint costs: peak memory of a save and of a load, and the step that runs while it is written.

usage: python -m tests.workers.checkpoint_cost OUT.json [HIDDEN LAYERS VOCABULARY LENGTH]
The sizes of the model; those of docs/checkpoint-format.md are 512 8 32000 256, the default.
"""

import json
import math
import sys
import tempfile
import threading
import time
from pathlib import Path

from ssa_megatron.checkpoint.reader import Checkpoint, load_into
from ssa_megatron.checkpoint.writer import PendingCheckpoint, save_checkpoint
from ssa_megatron.model.shapes import global_shapes
from ssa_megatron.parallel.state import finalize, initialize
from tests.ssa_megatron.support import build, own_rows, take_steps, tiny, train_step

ROUNDS = 5


def anonymous_bytes() -> int:
    """Memory of this process that is not a mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def peak_while(action) -> int:
    """Bytes that `action` held at most beyond what was held before it, looked at every millisecond."""
    before, peak, done = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return max(0, peak[0] - before)


def measure(folder: Path, hidden: int, layers: int, vocabulary: int, length: int, parallel) -> dict:
    recipe = tiny(
        model__hidden_size=hidden,
        model__num_layers=layers,
        model__vocab_size=vocabulary,
        model__head_dim=hidden // 4,
        model__ffn_size=3 * hidden,
        model__max_sequence_length=length,
        train__sequence_length=length,
    )
    model, optimizer = build(recipe, parallel)
    take_steps(model, optimizer, recipe, parallel, 0, 1)
    about = {"step": 1, "state": {"step": 1}, "tokenizer_fingerprint": "t"}

    def save() -> None:
        assert save_checkpoint(folder, optimizer, recipe, parallel, **about) is None

    def step(number: int, saving: bool) -> tuple[float, float]:
        """(seconds of a step that a checkpoint precedes, seconds of it that were waiting for the checkpoint)."""
        began, waited = time.monotonic(), 0.0

        def finish() -> None:
            nonlocal waited
            waiting = time.monotonic()
            assert pending is None or pending.finish() is None
            waited = time.monotonic() - waiting

        pending = PendingCheckpoint(folder, optimizer, recipe, parallel, **about) if saving else None
        rows = own_rows(recipe, parallel, number)
        train_step(model, optimizer, rows, recipe, parallel, step=number, lr=1e-3, before_update=finish)
        return time.monotonic() - began, waited

    def seconds(action) -> float:
        began = time.monotonic()
        action()
        return time.monotonic() - began

    saving = peak_while(save)
    checkpoint = Checkpoint.open(folder)
    loading = peak_while(lambda: load_into(checkpoint, optimizer, applied_steps=1))
    alone, at_once, meanwhile, waited = [], [], [], []
    for number in range(
        1, 1 + ROUNDS
    ):  # in turns, and the fastest of each counts: the machine's other load is not ours
        alone.append(step(number, saving=False)[0])
        at_once.append(seconds(save) + step(number, saving=False)[0])
        took, wait = step(number, saving=True)
        meanwhile.append(took)
        waited.append(wait)
    return {
        "largest tensor": max(4 * math.prod(shape) for shape in global_shapes(recipe).values()),
        "checkpoint": sum(file.bytes for file in checkpoint.content.files.values()),
        "files": len(checkpoint.content.files),
        "peak while saving": saving,
        "peak while loading": loading,
        "step": min(alone),
        "save, then step": min(at_once),
        "step while saving": min(meanwhile),
        "waited": min(waited),
    }


def main() -> None:
    out, sizes = Path(sys.argv[1]), [int(size) for size in sys.argv[2:]] or [512, 8, 32000, 256]
    parallel = initialize(tiny())
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        found = measure(
            Path(parallel.broadcast_object(folder)), *sizes, parallel
        )  # of the writer rank, which also writes the manifest
        if parallel.is_rank0:
            out.write_text(json.dumps(found, indent=1))
        parallel.barrier()
    finalize()


if __name__ == "__main__":
    main()
