"""Worker: one rank of a world that does not exist (fake process groups, weights without memory), as training would build it.

usage: python -m tests.workers.dry_rank RECIPE WORLD RANK... section.field=value...
Prints JSON: where each rank stands, its layers, the bytes of its weights, the elements of global tensors they hold.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ssa_megatron.config import load_recipe


def build_rank(recipe, world: int, rank: int) -> dict:
    from ssa_megatron.model.build import build_chunks
    from ssa_megatron.model.names import named_parameters
    from ssa_megatron.parallel.state import finalize, initialize

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    parallel = initialize(recipe)
    with torch.device("meta"):
        model = build_chunks(recipe, parallel)
    assert all(p.is_meta for p in model.parameters())
    blocks = [block for named in named_parameters(model, recipe, parallel) for block in named.slabs]
    found = {
        "tensor": parallel.tp_rank,
        "pipeline": parallel.pp_rank,
        "context": parallel.cp_rank,
        "data": parallel.dp_rank,
        "dp_cp_size": parallel.dp_cp_size,
        "layers": [layer.layer_number - 1 for chunk in model.chunks for layer in chunk.decoder.layers],
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "blocks": sum(block.numel for block in blocks),
    }
    finalize()
    return found


def main() -> None:
    name, world, *rest = sys.argv[1:]
    overrides = [argument for argument in rest if "=" in argument]
    recipe = load_recipe(name, overrides)
    make = dist.new_group
    dist.new_group = lambda *args, **kwargs: make(*args, **kwargs | {"backend": "fake"})  # nobody to shake hands with
    print(json.dumps([build_rank(recipe, int(world), int(rank)) for rank in rest[: len(rest) - len(overrides)]]))


if __name__ == "__main__":
    main()
