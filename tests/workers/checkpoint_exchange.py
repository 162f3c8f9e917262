"""Worker of two processes: writes checkpoints data-parallel and tensor-parallel, and loads each other's and one process's.

usage: python -m tests.workers.checkpoint_exchange FOLDER
FOLDER holds `PRECISION-one` run folders written by one process. Every load is saved again, as `PRECISION-FROM-to-TO`; the
loss and gradient norm of the step after each load go to results.json.
"""

import json
import sys
from pathlib import Path

from megatron.core import parallel_state

from ssa_megatron.checkpoint.reader import load_into, newest_valid
from ssa_megatron.checkpoint.writer import save_checkpoint
from ssa_megatron.parallel import context as parallel
from tests.ssa_megatron.support import build, take_steps, tiny

STEPS = 3
PRECISIONS = ("fp32", "bf16")
TENSOR = {"one": 1, "dp2": 1, "tp2": 2}


def recipe_of(precision: str, place: str):
    return tiny(train__precision=precision, parallel__tensor=TENSOR[place])


def save(folder: Path, optimizer, recipe, context, step: int = STEPS) -> None:
    state = {"applied_steps": optimizer.applied_steps}
    problem = save_checkpoint(folder, optimizer, recipe, context, step=step, state=state, tokenizer_fingerprint="t")
    assert problem is None, problem


def train_and_save(root: Path, precision: str, place: str, context) -> None:
    recipe = recipe_of(precision, place)
    model, optimizer = build(recipe, context)
    take_steps(model, optimizer, recipe, context, 0, STEPS)
    save(root / f"{precision}-{place}", optimizer, recipe, context)


def load_and_save(root: Path, precision: str, source: str, place: str, context) -> list[float]:
    """[loss, gradient norm] of the step that follows the load."""
    recipe = recipe_of(precision, place)
    model, optimizer = build(recipe, context)
    checkpoint, rejected = newest_valid(root / f"{precision}-{source}", context)
    assert rejected == []
    load_into(checkpoint, optimizer, applied_steps=checkpoint.content.state["applied_steps"])
    save(root / f"{precision}-{source}-to-{place}", optimizer, recipe, context)
    [result] = take_steps(model, optimizer, recipe, context, STEPS, STEPS + 1)
    return [result.loss, result.grad_norm]


def main() -> None:
    root = Path(sys.argv[1])
    results = {}
    for place, first in (("dp2", True), ("tp2", True), ("dp2", False)):
        context = parallel.initialize(recipe_of("fp32", place))
        for precision in PRECISIONS:
            if first:
                train_and_save(root, precision, place, context)
                sources = ["one", "dp2"]
            else:
                sources = ["tp2"]
            for source in sources:
                found = load_and_save(root, precision, source, place, context)
                results[f"{precision}-{source}-to-{place}"] = found
        parallel_state.destroy_model_parallel()  # the processes stay together and are cut anew
    if context.is_writer:
        (root / "results.json").write_text(json.dumps(results))
    parallel.finalize()


if __name__ == "__main__":
    main()
