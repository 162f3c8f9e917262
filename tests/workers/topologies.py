"""Worker: three clipped AdamW steps of each case, in whatever topology it asks for, against the same case in one process.

usage: python -m tests.workers.topologies FOLDER CASES.json
CASES.json is a list of {"name", "recipe": {"section.field": value}}. Launched alone it writes each case's reference to
FOLDER/KEY.pt; launched in several processes it writes to CASES.json.out, per case, the relative errors of loss, alignment and
gradient norm, of the worst parameter's gradient at the optimizer's step and of the worst parameter after three steps. A case
with a "trap" springs it (`traps.py`) in the several processes. Any error ends the worker, an error of a trap too: a trap that
raises is not silent, and nothing would be compared.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from megatron.core import parallel_state

from ssa_megatron.config import Recipe, resolve
from ssa_megatron.parallel.state import finalize, initialize, world_size
from ssa_megatron.train.step import StepRunner
from tests.ssa_megatron.support import (
    build,
    changed_deepspeed,
    global_tensors,
    gradients_at_step,
    own_rows,
    small_buckets,
)
from tests.workers.traps import BROKEN, SPRINGS

STEPS = 3
BASE = {
    "name": "topology",
    "model": {
        "vocab_size": 53,  # odd: tensor-parallel ranks hold padding rows
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 48,
        "max_sequence_length": 32,
        "rope_theta": 1000.0,
        "init_std": 0.2,  # large enough that routing has no near-ties
    },
    "attention": {"kind": "ssa", "block_size": 4, "block_count": 3, "window": 9},
    "optimizer": {"clip_grad_norm": 0.1},
    "train": {
        "steps": STEPS,
        "sequence_length": 32,
        "global_batch_rows": 4,
        "micro_batch_rows": 1,
        "precision": "fp32",
    },
}
PLACEMENT = ("parallel", "zero")  # sections that say where things lie, not what is computed


def recipe_of(case: dict, alone: bool = False) -> Recipe:
    values = {name: dict(part) if isinstance(part, dict) else part for name, part in BASE.items()}
    for key, value in case["recipe"].items():
        section, field = key.split(".")
        if not (alone and (section in PLACEMENT or field == "recompute")):
            values.setdefault(section, {})[field] = value
    return resolve(values, origin=case["name"])


def key(case: dict) -> str:
    """Cases that compute the same share a reference."""
    return hashlib.sha256(recipe_of(case, alone=True).model_dump_json().encode()).hexdigest()[:16]


def run_case(recipe: Recipe, parallel, trap: str | None = None) -> dict:
    """Losses and norms of the steps, gradients of the first at the optimizer's step, masters after the last."""
    before, after = (SPRINGS | BROKEN)[trap] if trap else (nullcontext, lambda *_: None)
    with changed_deepspeed(small_buckets), before():
        model, optimizer = build(recipe, parallel)
    after(model if isinstance(model, list) else [model], optimizer)
    results = {"losses": [], "alignments": [], "norms": []}
    for step in range(STEPS):
        runner = StepRunner(model, optimizer, recipe, parallel)
        losses = runner.compute(runner.draw(own_rows(recipe, parallel, step), step=step))
        optimizer.finish_gradients()
        with gradients_at_step(optimizer) as at_step:
            norm, applied = optimizer.step(1e-3)
        if step == 0:
            results["gradients"] = global_tensors(at_step, recipe, parallel)
        assert applied
        results["losses"].append(losses.cross_entropy)
        results["alignments"].append(losses.alignment)
        results["norms"].append(norm)
    masters = ((fragment, fragment.master) for fragment in optimizer.fragments())
    results["parameters"] = global_tensors(masters, recipe, parallel)
    return results


def errors(found: dict, reference: dict) -> dict:
    def worst_number(name):
        return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(found[name], reference[name], strict=True))

    def worst_tensor(name):
        relative = {
            n: float((t - reference[name][n]).norm() / reference[name][n].norm()) for n, t in found[name].items()
        }
        where = max(relative, key=relative.get)
        return relative[where], where

    gradient, gradient_name = worst_tensor("gradients")
    parameter, parameter_name = worst_tensor("parameters")
    return {
        "loss": worst_number("losses"),
        "alignment": worst_number("alignments"),
        "norm": worst_number("norms"),
        "gradient": gradient,
        "parameter": parameter,
        "where": [gradient_name, parameter_name],
    }


def main() -> None:
    folder, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    alone, results = world_size() == 1, {}
    parallel, layout = None, None
    for case in sorted(cases, key=lambda case: str(recipe_of(case).parallel)):  # groups are never given back: few cuts
        path = folder / f"{key(case)}.pt"
        if alone and path.exists():
            continue
        began = time.monotonic()
        recipe = recipe_of(case, alone)
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{time.monotonic():.0f} {case['name']}", flush=True
            )  # the last one is the culprit when time runs out
        if layout != recipe.parallel:
            if parallel is not None:
                parallel_state.destroy_model_parallel()  # the processes stay together and are cut anew
            parallel, layout = initialize(recipe), recipe.parallel
        found = run_case(recipe, parallel, None if alone else case.get("trap"))
        if alone:
            torch.save(found, path)
        else:
            reference = torch.load(path, weights_only=True)
            results[case["name"]] = {**errors(found, reference), "seconds": round(time.monotonic() - began, 1)}
    if not alone and parallel.is_rank0:
        Path(f"{sys.argv[2]}.out").write_text(json.dumps(results))
    finalize()


if __name__ == "__main__":
    main()
