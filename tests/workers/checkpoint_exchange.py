"""Worker: trains and saves at every place of its number of processes, and loads what other places saved.

usage: python -m tests.workers.checkpoint_exchange FOLDER
FOLDER holds run folders PRECISION-PLACE, of smaller and larger launches too. Every load is saved again, as
PRECISION-FROM-to-PLACE. The loss and gradient norm of step 4, trained on or loaded, go to PROCESSES.json, under the same names.
Started again when other launches have written, it does the loads that were not possible before.
"""

import json
import sys
from pathlib import Path

from megatron.core import parallel_state

from ssa_megatron.checkpoint.reader import load_into, newest_valid
from ssa_megatron.checkpoint.writer import PendingCheckpoint, save_checkpoint
from ssa_megatron.parallel.state import finalize, initialize, world_size
from tests.ssa_megatron.support import build, changed_deepspeed, own_rows, small_buckets, take_steps, tiny, train_step

STEPS = 3
PRECISIONS = ("fp32", "bf16")
SEQUENCE = {"parallel__tensor": 2, "parallel__sequence": True}
PLACES = {  # a place: processes, and what its recipe says; a new row is saved, loaded and compared like the others
    "one": (1, {}),
    "dp2": (2, {}),
    "dp2 ZeRO-2": (2, {"zero__stage": 2}),
    "dp2 ZeRO-2 offloaded": (2, {"zero__stage": 2, "zero__offload_optimizer": True, "train__recompute": "full"}),
    "dp2 ZeRO-3": (2, {"zero__stage": 3}),
    "tp2": (2, {"parallel__tensor": 2}),
    "pp2": (2, {"parallel__pipeline": 2}),
    "cp2": (2, {"parallel__context": 2}),
    "tp2 sequence ZeRO-3": (2, {**SEQUENCE, "zero__stage": 3}),
    "tp2xdp2": (4, {"parallel__tensor": 2}),
    "tp2xpp2 sequence": (4, {**SEQUENCE, "parallel__pipeline": 2}),
    "tp4 on two key/value heads": (4, {"parallel__tensor": 4}),
    "cp2xpp2 interleaved": (4, {"parallel__context": 2, "parallel__pipeline": 2, "parallel__virtual_pipeline": 2}),
    "tp2xdp2 sequence ZeRO-2": (4, {**SEQUENCE, "zero__stage": 2}),
    "tp2xdp2 sequence ZeRO-3": (4, {**SEQUENCE, "zero__stage": 3, "train__recompute": "selective"}),
    "cp2xdp2 ZeRO-3": (4, {"parallel__context": 2, "zero__stage": 3}),
    "tp2xpp2xdp2": (8, {"parallel__tensor": 2, "parallel__pipeline": 2}),
}
NAMES = list(PLACES)
CHAIN = [  # what the one before has loaded and saved again is loaded by the next
    ("tp2xpp2xdp2", "dp2 ZeRO-3"),
    ("tp2xpp2xdp2-to-dp2 ZeRO-3", "one"),
    ("tp2xpp2xdp2-to-dp2 ZeRO-3-to-one", "cp2"),
]
LOADS = sorted(  # from one process to every place and back, from every place to the next, and the chain
    {("one", place) for place in NAMES[1:]}
    | {(place, "one") for place in NAMES[1:]}
    | set(zip(NAMES[1:], [*NAMES[2:], NAMES[1]], strict=True))
    | set(CHAIN)
)


def recipe_of(precision: str, place: str):
    overrides = {
        "model__num_layers": 4,
        "train__sequence_length": 32,
        "train__global_batch_rows": 8,
        "optimizer__clip_grad_norm": 0.1,
    }
    return tiny(train__precision=precision, **overrides, **PLACES[place][1])


def train_and_save(root: Path, precision: str, place: str, parallel) -> list[float]:
    """[loss, gradient norm] of the step during which the checkpoint of the one before it was written."""
    recipe = recipe_of(precision, place)
    with changed_deepspeed(small_buckets):
        model, optimizer = build(recipe, parallel)
    take_steps(model, optimizer, recipe, parallel, 0, STEPS)
    said = []
    state = {"applied_steps": optimizer.applied_steps}
    folder = root / f"{precision}-{place}"
    pending = PendingCheckpoint(folder, optimizer, recipe, parallel, step=STEPS, state=state, tokenizer_fingerprint="t")
    result = train_step(
        model,
        optimizer,
        own_rows(recipe, parallel, STEPS),
        recipe,
        parallel,
        step=STEPS,
        lr=1e-3,
        before_update=lambda: said.append(pending.finish()),
    )
    assert said == [None], said
    return [result.loss, result.grad_norm]


def load_and_save(root: Path, precision: str, source: str, place: str, parallel) -> list[float]:
    """[loss, gradient norm] of the step that follows the load."""
    recipe = recipe_of(precision, place)
    with changed_deepspeed(small_buckets):
        model, optimizer = build(recipe, parallel)
    checkpoint, rejected = newest_valid(root / f"{precision}-{source}", parallel)
    assert rejected == []
    state = checkpoint.content.state
    load_into(checkpoint, optimizer, applied_steps=state["applied_steps"])
    folder = root / f"{precision}-{source}-to-{place}"
    problem = save_checkpoint(folder, optimizer, recipe, parallel, step=STEPS, state=state, tokenizer_fingerprint="t")
    assert problem is None, problem
    [result] = take_steps(model, optimizer, recipe, parallel, STEPS, STEPS + 1)
    return [result.loss, result.grad_norm]


def visit(root: Path, place: str, parallel, results: dict) -> None:
    """Everything at one place that is possible by now and not done yet."""
    for precision in PRECISIONS:
        name = f"{precision}-{place}"
        if name not in results:
            results[name] = train_and_save(root, precision, place, parallel)
        for source, to in LOADS:
            name = f"{precision}-{source}-to-{place}"
            if to == place and name not in results and (root / f"{precision}-{source}").exists():
                results[name] = load_and_save(root, precision, source, place, parallel)


def main() -> None:
    root = Path(sys.argv[1])
    processes = world_size()
    file = root / f"{processes}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    places = [place for place, (count, _) in PLACES.items() if count == processes]
    for place in places + places[:1]:  # the first loads from the last
        parallel = initialize(recipe_of("fp32", place))
        visit(root, place, parallel, results)
        parallel_state.destroy_model_parallel()  # the processes stay together and are cut anew
    if parallel.is_rank0:
        file.write_text(json.dumps(results))
    finalize()


if __name__ == "__main__":
    main()
