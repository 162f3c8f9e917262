"""Worker of two ranks: a checkpoint written while the next step runs, on a slow disk and on one that is full for one rank.

usage: python -m tests.workers.checkpoint_while_training FOLDER
Writes FOLDER/found.json: per ZeRO stage, what each rank saw.
"""

import json
import resource
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from ssa_megatron.checkpoint import writer
from ssa_megatron.checkpoint.manifest import committed
from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.checkpoint.writer import PendingCheckpoint, save_checkpoint
from ssa_megatron.parallel.state import finalize, initialize
from tests.ssa_megatron.support import build, own_rows, take_steps, tiny, train_step

STAGES = (1, 2, 3)


class Run:
    def __init__(self, folder: Path, stage: int, parallel):
        self.folder, self.parallel = folder, parallel
        self.recipe = tiny(zero__stage=stage, train__precision="bf16")
        self.model, self.optimizer = build(self.recipe, parallel)
        take_steps(self.model, self.optimizer, self.recipe, parallel, 0, 2)

    def save(self, step: int, pending: bool):
        how = PendingCheckpoint if pending else save_checkpoint
        about = {"step": step, "state": {"step": step}, "tokenizer_fingerprint": "t"}
        return how(self.folder, self.optimizer, self.recipe, self.parallel, **about)

    def step(self, number: int, before_update) -> dict:
        rows = own_rows(self.recipe, self.parallel, number)
        arguments = (self.model, self.optimizer, rows, self.recipe, self.parallel)
        return asdict(train_step(*arguments, step=number, lr=1e-3, before_update=before_update))


def slow_disk(run: Run) -> dict:
    """The same state saved at once, and by threads that read it only when step 2 has run its backward."""
    assert run.save(2, pending=False) is None
    writing, said, waited, backward_done = [], [], [], threading.Event()
    write = writer.write_safetensors

    def slowly(*args):
        assert backward_done.wait(300.0)
        return write(*args)

    writer.write_safetensors = slowly
    pending = run.save(3, pending=True)
    writer.write_safetensors = write

    def finish():
        writing.append(not any(future.done() for _, _, future in pending._files))
        backward_done.set()
        began = time.monotonic()
        said.append(pending.finish())
        waited.append(time.monotonic() - began)

    result = run.step(2, finish)
    return {
        "said": said,
        "was still writing after backward": writing,
        "waited": waited[0],
        "applied": result["applied"],
        "digests": [Checkpoint.open(run.folder, step=step).digest(("weight", "master", "exp_avg")) for step in (2, 3)],
    }


def full_disk(run: Run) -> dict:
    """Rank 1 finds no room; rank 0 does."""
    said = []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if run.parallel.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    pending = run.save(4, pending=True)
    result = run.step(3, lambda: said.append(pending.finish()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.parallel.barrier()
    entries = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    run.parallel.barrier()
    assert run.save(5, pending=False) is None
    return {
        "said": said,
        "applied": result["applied"],
        "entries": entries,
        "then": [path.name for path in committed(run.folder)],
    }


def main() -> None:
    folder = Path(sys.argv[1])
    parallel = initialize(tiny())
    found = {}
    for stage in STAGES:
        run = Run(folder / str(stage), stage, parallel)
        found[stage] = {
            "slow": parallel.all_gather_object(slow_disk(run)),
            "full": parallel.all_gather_object(full_disk(run)),
        }
    if parallel.is_rank0:
        (folder / "found.json").write_text(json.dumps(found))
    finalize()


if __name__ == "__main__":
    main()
