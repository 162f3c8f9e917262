"""Run by test_planning.py: what this rank's model and optimizer hold after a step, and what the step sent, as JSON.

`python -m tests.workers.planned_and_real OUT ROWS` writes OUT/rank-R.json; ROWS is a JSON list of overrides for support.tiny that
cut the model alike.
"""

import json
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssa_megatron.parallel.state import finalize, initialize
from tests.ssa_megatron.support import build, take_steps, tiny

OPERATIONS = {
    "send": "send",
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
SCALARS = 32  # bytes: norms, losses and agreements, which the plan leaves out


class Payloads(TorchDispatchMode):
    """Bytes of the whole tensor of every collective, by operation."""

    def __init__(self):
        super().__init__()
        self.bytes = dict.fromkeys(OPERATIONS.values(), 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and (operation := OPERATIONS.get(name)):
            group = next(torch.distributed.ProcessGroup.unbox(a) for a in args if isinstance(a, torch.ScriptObject))
            whole = args[1] if operation == "reduce-scatter" else args[0]
            size = sum(t.nbytes for t in (whole if isinstance(whole, list | tuple) else [whole]))
            self.bytes[operation] += size if size > SCALARS and group.size() > 1 else 0
        return func(*args, **(kwargs or {}))


def storages(tensors) -> int:
    """Bytes of the distinct storages behind `tensors`."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


def steps(overrides: dict, parallel) -> dict:
    recipe = tiny(**overrides)
    model, optimizer = build(recipe, parallel)
    take_steps(model, optimizer, recipe, parallel, 0, 1)
    with Payloads() as payloads:
        take_steps(model, optimizer, recipe, parallel, 1, 2)
    inner = optimizer.engine.optimizer.optimizer
    masters = list(inner.state)
    moments = [inner.state[flat][name] for flat in masters for name in optimizer.kind.state]
    held = {
        "weights": storages(getattr(p, "ds_tensor", p) for p in model.parameters()),
        "masters (fp32)": storages(masters),
        "moments (fp32)": storages(moments),
    }
    if recipe.zero.stage != 2:  # whose gradients end with the step
        sharded = optimizer.engine.optimizer
        flat = [sharded.grad_partitions_flat_buffer] if recipe.zero.stage == 3 else sharded.fp32_groups_gradients_flat
        held["gradients (fp32)"] = storages(flat)
    return {"held": held, "payloads": payloads.bytes}


def main() -> None:
    out, rows = Path(sys.argv[1]), json.loads(sys.argv[2])
    parallel = initialize(tiny(**rows[0]))
    found = [steps(overrides, parallel) for overrides in rows]
    (out / f"rank-{parallel.rank}.json").write_text(json.dumps(found))
    finalize()


if __name__ == "__main__":
    main()
