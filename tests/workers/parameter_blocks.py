"""Worker: which rectangles of which global tensors each rank's parameters are, and the initial weights they hold.

usage: python -m tests.workers.parameter_blocks OUT.json TENSOR
Writes, per case, one list a rank: per parameter its size, whether it is replicated, and its blocks; and the sha256 of every
global tensor put together from all ranks.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch

from ssa_megatron.model.build import build_model
from ssa_megatron.model.names import named_parameters
from ssa_megatron.model.shapes import global_shapes
from ssa_megatron.parallel.state import finalize, initialize
from tests.ssa_megatron.support import tiny

CASES = {
    "ssa, tied, odd vocabulary": {},
    "ssa, untied, odd vocabulary": {"model__tied_embeddings": False},
    "nsa, tied, odd vocabulary": {"attention__kind": "nsa", "model__vocab_size": 51},
    "moba, untied, even vocabulary": {"attention__kind": "moba", "model__tied_embeddings": False, "model__vocab_size": 54},
    "full, a head per group, wide MLP": {"attention__kind": "full", "model__num_kv_heads": 4, "model__ffn_size": 62},
    "heads wider than the model": {"model__head_dim": 20, "model__num_layers": 3},
}  # fmt: skip


def describe(case: str, parallel) -> dict:
    recipe = tiny(**CASES[case], parallel__tensor=parallel.tp_size)
    model = build_model(recipe, parallel)
    parameters, parts = [], []
    for named in named_parameters(model, recipe, parallel):
        blocks = [[b.name, list(b.global_shape), list(b.offset), list(b.shape), b.start] for b in named.slabs]
        parameters.append({"numel": named.parameter.numel(), "replicated": named.replicated, "blocks": blocks})
        flat = named.parameter.detach().view(-1)
        for b in named.slabs:
            parts.append((b.name, b.offset, flat[b.start : b.start + b.numel].view(b.shape)))
    whole = {name: torch.full(shape, torch.nan) for name, shape in global_shapes(recipe).items()}
    for name, offset, part in (piece for own in parallel.all_gather_object(parts) for piece in own):
        whole[name][tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True))] = part
    return {
        "ranks": parallel.all_gather_object(parameters),
        "count": sum(p.numel() for p in model.parameters()),
        "sha256": {name: hashlib.sha256(t.numpy().tobytes()).hexdigest() for name, t in whole.items()},
    }


def main() -> None:
    out, tensor = sys.argv[1:]
    parallel = initialize(tiny(parallel__tensor=int(tensor)))
    found = {case: describe(case, parallel) for case in CASES}
    if parallel.is_rank0:
        Path(out).write_text(json.dumps(found))
    finalize()


if __name__ == "__main__":
    main()
