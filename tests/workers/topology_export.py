"""Worker: loads the checkpoint in FOLDER/start at every place of its number of processes and saves it as FOLDER/PLACE.

usage: python -m tests.workers.topology_export FOLDER
"""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from megatron.core import parallel_state

from ssa_megatron.checkpoint.reader import Checkpoint, load_into, newest_valid
from ssa_megatron.checkpoint.writer import save_checkpoint
from ssa_megatron.config import resolve
from ssa_megatron.parallel.state import finalize, initialize, world_size
from ssa_megatron.train.trainer import Progress
from tests.ssa_megatron.support import build

PLACES = {
    "one process": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2 with sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "context 2": (2, {"context": 2}),
    "data 2": (2, {}),
}


def main() -> None:
    root, processes = Path(sys.argv[1]), world_size()
    for place, (count, cut) in PLACES.items():
        if count != processes:
            continue
        start, run = root / "start", root / place
        recipe = resolve({**Checkpoint.open(start).recipe, "parallel": cut}, origin="test")
        parallel = initialize(recipe)
        checkpoint, _ = newest_valid(start, parallel)
        _, optimizer = build(recipe, parallel)
        load_into(checkpoint, optimizer, applied_steps=0)
        about = {"step": 9, "state": asdict(Progress(step=9))}
        about["tokenizer_fingerprint"] = checkpoint.content.tokenizer_fingerprint
        problem = save_checkpoint(run, optimizer, recipe, parallel, **about)
        assert problem is None, problem
        if parallel.is_rank0:
            shutil.copyfile(start / "tokenizer.model", run / "tokenizer.model")
        parallel_state.destroy_model_parallel()  # the processes stay together and are cut anew
    finalize()


if __name__ == "__main__":
    main()
