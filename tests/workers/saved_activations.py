"""Run by test_planning.py under TRITON_INTERPRET=1: bytes autograd keeps of one layer, and of what follows the layers, as JSON.

`python -m tests.workers.saved_activations OUT` runs the model of every row of CASES with one and with two layers: the difference
is a layer.
"""

import json
import sys
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from ssa_kernels import api
from ssa_megatron.model.batch import ForwardContext
from ssa_megatron.model.build import build_model
from ssa_megatron.parallel.state import finalize, initialize
from ssa_megatron.train.step import draw_batches
from tests.ssa_megatron import toy_kind
from tests.ssa_megatron.support import Rows, tiny

ROW, DOCUMENT = 32, 16  # tokens
api.WRONG_INTERPRETED = ()  # sizes are looked at here, not values
CASES = [  # attention.kind, train.recompute, train.micro_batch_rows, train.precision
    ("ssa", "none", 1, "bf16"),
    ("ssa", "none", 2, "bf16"),
    ("ssa", "none", 1, "fp32"),
    ("ssa", "selective", 2, "bf16"),
    ("ssa", "full", 2, "bf16"),
    ("full", "none", 1, "bf16"),
    ("moba", "none", 1, "bf16"),
    ("nsa", "none", 1, "bf16"),
    ("nsa", "none", 2, "bf16"),
    (toy_kind.NAME, "none", 1, "bf16"),
    (toy_kind.NAME, "none", 2, "bf16"),
]


def recipe_of(kind: str, recompute: str, rows: int, precision: str, layers: int):
    return tiny(
        attention__kind=kind,
        attention__backend="triton",
        attention__block_size=16,
        model__num_heads=2,
        model__num_kv_heads=1,
        model__head_dim=16,
        model__ffn_size=80,
        model__num_layers=layers,
        train__recompute=recompute,
        train__precision=precision,
        train__sequence_length=ROW,
        train__micro_batch_rows=rows,
        train__global_batch_rows=rows,
    )


def kept(recipe, parallel) -> int:
    """Bytes of the distinct storages autograd saves in a forward of one micro-batch of documents, weights aside."""
    model = build_model(recipe, parallel)
    model.train()
    shape = (recipe.train.micro_batch_rows, ROW)
    starts = (torch.arange(ROW, dtype=torch.int32) // DOCUMENT * DOCUMENT).expand(shape).contiguous()
    [batch] = draw_batches(iter([Rows(torch.zeros(shape, dtype=torch.int64), starts)]), recipe, parallel, step=0)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # an address is not used twice
        return tensor

    context = ForwardContext.begin(batch, recipe)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=context)
    return sum(found.values())


def main() -> None:
    parallel = initialize(tiny())
    results = []
    with toy_kind.registered():
        for case in CASES:
            one, two = (kept(recipe_of(*case, layers), parallel) for layers in (1, 2))
            results.append({"layer": two - one, "rest": 2 * one - two})
    Path(sys.argv[1]).write_text(json.dumps(results))
    finalize()


if __name__ == "__main__":
    main()
