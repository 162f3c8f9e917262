"""The table of legal topologies: every row can be broken, says so with field and remedy, and what is legal passes."""

import pytest

from ssa_megatron.errors import ConfigError
from ssa_megatron.parallel import topology
from tests.ssa_megatron.support import tiny

# rule (in table order) -> (processes, overrides that break it and no earlier rule, words of reason and remedy)
BROKEN = [
    ("zero.stage", 2, {"zero__stage": 3, "parallel__pipeline": 2}, "a pipeline's schedule", "parallel.pipeline=1"),
    ("zero.offload_optimizer", 1, {"zero__offload_optimizer": True}, "BF16_Optimizer", "zero.stage=2"),
    ("parallel.pipeline", 2, {"parallel__pipeline": 4}, "must divide model.num_layers", "parallel.virtual_pipeline=1"),
    ("parallel.virtual_pipeline", 1, {"parallel__virtual_pipeline": 2}, "stages to interleave", "parallel.pipeline=2"),
    (
        "parallel.virtual_pipeline",
        2,
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "model__num_layers": 4,
            "train__global_batch_rows": 3,
        },
        "to be a multiple of parallel.pipeline",
        "a train.global_batch_rows that gives such a number",
    ),
    ("parallel.context", 2, {"parallel__context": 2}, "2 * parallel.context equal chunks", "parallel.context=1"),
    ("parallel.sequence", 1, {"parallel__sequence": True}, "there is one", "parallel.tensor=2"),
    (
        "parallel.sequence",
        2,
        {"parallel__sequence": True, "parallel__tensor": 2},
        "train.sequence_length to be a multiple of parallel.tensor * parallel.context",
        "a train.sequence_length that they divide",
    ),
    (
        "parallel.tensor",
        2,
        {"parallel__tensor": 2, "model__num_heads": 3, "model__num_kv_heads": 3},
        "must divide model.num_heads",
        "a number that divides model.num_heads",
    ),
    (
        "parallel.tensor",
        2,
        {"parallel__tensor": 2, "model__num_heads": 6, "model__num_kv_heads": 3},
        "either parallel.tensor divides model.num_kv_heads",
        "parallel.tensor=model.num_kv_heads",
    ),
    (
        "parallel.tensor",
        2,
        {"parallel__tensor": 2, "model__ffn_size": 49},
        "must divide model.ffn_size",
        "a model.ffn_size that it divides",
    ),
    ("world size", 3, {"parallel__tensor": 2}, "must be a multiple of parallel.tensor", "lower one of the three"),
    (
        "train.global_batch_rows",
        3,
        {},
        "a multiple of train.micro_batch_rows times the data-parallel size",
        "a smaller train.micro_batch_rows",
    ),
    (
        "train.eval_rows",
        2,
        {"train__eval_interval": 1, "train__eval_rows": 3},
        "a multiple of the data-parallel size",
        "a multiple of it",
    ),
    (
        "train.eval_rows",
        2,
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "model__num_layers": 4,
            "train__eval_interval": 1,
            "train__eval_rows": 3,
        },
        "a multiple of the data-parallel size times parallel.pipeline",
        "parallel.virtual_pipeline=1",
    ),
]


@pytest.mark.parametrize("number", range(len(topology.RULES)))
def test_a_broken_rule_is_refused_with_field_reason_and_remedy(number):
    field, world, overrides, reason, remedy = BROKEN[number]
    recipe = tiny(**overrides)
    first_broken = next(i for i, rule in enumerate(topology.RULES) if rule.broken(recipe, world))
    assert first_broken == number, "the case is answered by another rule than its own"
    with pytest.raises(ConfigError) as refused:
        topology.check(recipe, world)
    assert refused.value.problem.startswith(f"{field} is not possible for {world} process(es)")
    assert reason in refused.value.problem
    assert remedy in refused.value.remedy
    assert f"tensor={recipe.parallel.tensor}" in refused.value.problem


def test_the_table_above_has_one_case_a_rule():
    assert len(BROKEN) == len(topology.RULES)


LEGAL = [
    (1, {}),
    (2, {}),
    (4, {}),
    (2, {"parallel__tensor": 2}),
    (4, {"parallel__tensor": 2}),
    (2, {"parallel__tensor": 2, "parallel__sequence": True, "train__sequence_length": 34}),
    (2, {"parallel__tensor": 2, "model__vocab_size": 51}),
    (1, {"model__num_heads": 3, "model__num_kv_heads": 3, "model__ffn_size": 49}),
    (2, {"train__eval_interval": 0, "train__eval_rows": 3}),
    (1, {"train__recompute": "selective"}),
    (2, {"zero__stage": 2, "zero__offload_optimizer": True}),
    (4, {"zero__stage": 3, "parallel__tensor": 2}),
    (2, {"parallel__pipeline": 2}),
    (2, {"parallel__pipeline": 2, "parallel__virtual_pipeline": 2, "model__num_layers": 4}),
    (4, {"parallel__pipeline": 2}),
    (2, {"parallel__context": 2, "train__sequence_length": 36}),
    (4, {"parallel__tensor": 4}),
    (4, {"parallel__tensor": 2, "parallel__context": 2, "train__sequence_length": 36, "model__num_kv_heads": 1}),
    (1, {"train__recompute": "full", "train__precision": "bf16"}),
]


@pytest.mark.parametrize(("world", "overrides"), LEGAL)
def test_what_is_legal_passes(world, overrides):
    topology.check(tiny(**overrides), world)


def test_a_legal_topology_divides_the_global_batch_exactly():
    for world, overrides in LEGAL:
        recipe = tiny(**overrides)
        ranks = topology.data_parallel_size(recipe, world)
        rows = topology.micro_batches(recipe, world) * ranks * recipe.train.micro_batch_rows
        assert rows == recipe.train.global_batch_rows
        assert ranks * topology.model_ranks(recipe) == world
