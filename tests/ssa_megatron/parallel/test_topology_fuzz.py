"""Fifty random mixes of parallelism, ZeRO stage, recompute and model shape, each against one process. Slow; seeded.

What a draw may be is what `parallel/topology.py` lets through, so a rule that is too lax shows here as a wrong gradient.
"""

import random

import pytest

from ssa_megatron.errors import ConfigError
from ssa_megatron.parallel import topology
from tests.ssa_megatron.parallel.test_topologies_equal_one_process import compare, judge
from tests.workers.topologies import recipe_of

DRAWS = 50
SEED = 20251120


def draw(rng: random.Random, world: int) -> dict:
    kv_heads = rng.choice((1, 2, 4))
    pipeline, chunks = rng.choice(((1, 1), (2, 1), (2, 2), (4, 1), (4, 1)))
    return {
        "parallel.tensor": rng.choice((1, 1, 2, 4)),
        "parallel.sequence": rng.random() < 0.5,
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": chunks,
        "parallel.context": rng.choice((1, 1, 2, 4)),
        "zero.stage": rng.choice((1, 1, 2, 3)),
        "train.recompute": rng.choice(("none", "selective", "full")),
        "train.global_batch_rows": rng.choice((4, 8)),
        "train.micro_batch_rows": rng.choice((1, 2)),
        "train.seed": rng.randrange(1000),
        "model.tied_embeddings": rng.random() < 0.5,
        "model.vocab_size": rng.choice((50, 53, 64)),
        "model.num_kv_heads": kv_heads,
        "model.num_heads": kv_heads * rng.choice((1, 2, 4)),
        "attention.kind": rng.choice(("ssa", "ssa", "full", "moba", "nsa")),
        "attention.block_count": rng.choice((1, 2, 3, 8)),
    }


def legal(recipe: dict, world: int) -> bool:
    cuts = ("tensor", "pipeline", "context")
    if world > 1 and all(recipe[f"parallel.{name}"] == 1 for name in cuts) and recipe["zero.stage"] == 1:
        return False  # plain data parallelism is in the table already
    try:
        topology.check(recipe_of({"name": "fuzz", "recipe": recipe}), world)
    except ConfigError:
        return False
    return True


def draws() -> dict[int, dict[str, dict]]:
    rng, cases = random.Random(SEED), {2: {}, 4: {}}
    while sum(len(rows) for rows in cases.values()) < DRAWS:
        world = rng.choice((2, 4))
        recipe = draw(rng, world)
        if legal(recipe, world):
            placed = " ".join(f"{key.split('.')[1]}={value}" for key, value in recipe.items())
            cases[world][f"{len(cases[world])} {placed}"] = recipe
    return cases


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_random_topologies_compute_what_one_process_computes(tmp_path):
    results = compare(tmp_path, draws())
    assert len(results) == DRAWS
    for result in results.values():
        result["allowed"]["parameter"] = 5e-5  # AdamW divides by the roots of second moments, some of them tiny here
        judge(result)


def test_the_draws_reach_every_dimension():
    recipes = [recipe for rows in draws().values() for recipe in rows.values()]
    for key in (
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.context",
        "zero.stage",
        "train.recompute",
        "attention.kind",
    ):
        assert len({recipe[key] for recipe in recipes}) >= 3, key
    assert {recipe["parallel.virtual_pipeline"] for recipe in recipes} == {1, 2}
    assert any(recipe["parallel.tensor"] > recipe["model.num_kv_heads"] for recipe in recipes)
