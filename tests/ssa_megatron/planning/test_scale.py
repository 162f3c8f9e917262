"""Recipes for worlds nobody has here: ranks of 64 and 1024 processes are built as training would build them, and the plan holds.

The process groups are torch's fake ones and the weights are on the meta device; everything else is the trainer's own code.
"""

import json

import pytest

from ssa_megatron.config import load_recipe
from ssa_megatron.planning.memory import stage_memory
from ssa_megatron.planning.rank_shapes import rank_shapes
from tests.launch import run

# recipe, world -> (overrides, ranks: first, last, one in the middle of everything, one of every pipeline stage)
WORLDS = {
    ("ssa-8b", 64): ((), (0, 63, 37)),
    ("ssa-8b", 1024): (("train.eval_rows=512",), (0, 1023, 700)),
    ("ssa-70b-128k", 1024): ((), (0, 256, 517, 1023)),
}


@pytest.mark.parametrize(("name", "world"), WORLDS)
def test_a_rank_of_a_large_world_is_what_the_plan_says(name, world):
    overrides, ranks = WORLDS[name, world]
    recipe = load_recipe(name, overrides)
    planned = rank_shapes(recipe, world)
    parallel, m = recipe.parallel, recipe.model
    output = run(1, "tests.workers.dry_rank", name, str(world), *map(str, ranks), *overrides, timeout=200)
    found = json.loads(output.strip().splitlines()[-1])
    assert len(found) == len(ranks)
    assert len({rank["pipeline"] for rank in found}) == parallel.pipeline
    for rank in found:
        stage = rank["pipeline"]
        states = stage_memory(recipe, planned, stage).states
        assert rank["weights"] == states["weights"]
        share = 4 * rank["blocks"] / rank["dp_cp_size"]  # fp32, ZeRO-1; partitions are padded to equal parts
        assert share <= states["masters (fp32)"] < share + 64
        assert states["moments (fp32)"] == 2 * states["masters (fp32)"]
        assert (
            rank["blocks"] * 2 == rank["weights"]
        )  # bf16, and no padding: the vocabulary is a multiple of the tensor ranks
        assert rank["dp_cp_size"] == world // (parallel.tensor * parallel.pipeline)
        layers = m.num_layers // parallel.pipeline
        assert rank["layers"] == list(range(stage * layers, (stage + 1) * layers))
