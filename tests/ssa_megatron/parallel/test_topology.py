"""The table of legal topologies: every row can be broken, says so with field and remedy, and what is legal passes."""

import pytest

from ssa_megatron.config.variants import OPTIMIZERS
from ssa_megatron.errors import ConfigError
from ssa_megatron.optim.adamw import AdamW
from ssa_megatron.parallel import topology
from tests.errors import raises
from tests.ssa_megatron.support import tiny

# id (in table order) -> (field, processes, overrides that break it and no earlier rule, what the remedy mentions)
BROKEN = {
    "zero-stage-with-pipeline": ("zero.stage", 2, {"zero__stage": 3, "parallel__pipeline": 2}, "parallel.pipeline=1"),
    "offload-under-zero-1": ("zero.offload_optimizer", 1, {"zero__offload_optimizer": True}, "zero.stage=2"),
    "pipeline-divides-layers": ("parallel.pipeline", 2, {"parallel__pipeline": 4}, "parallel.virtual_pipeline=1"),
    "interleaving-without-pipeline": (
        "parallel.virtual_pipeline",
        1,
        {"parallel__virtual_pipeline": 2},
        "parallel.pipeline=2",
    ),
    "interleaving-micro-batches": (
        "parallel.virtual_pipeline",
        2,
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "model__num_layers": 4,
            "train__global_batch_rows": 3,
        },
        "train.global_batch_rows",
    ),
    "context-divides-row": ("parallel.context", 2, {"parallel__context": 2}, "parallel.context=1"),
    "sequence-without-tensor": ("parallel.sequence", 1, {"parallel__sequence": True}, "parallel.tensor=2"),
    "sequence-divides-row": (
        "parallel.sequence",
        2,
        {"parallel__sequence": True, "parallel__tensor": 2},
        "train.sequence_length",
    ),
    "tensor-divides-heads": (
        "parallel.tensor",
        2,
        {"parallel__tensor": 2, "model__num_heads": 3, "model__num_kv_heads": 3},
        "model.num_heads",
    ),
    "tensor-and-kv-heads": (
        "parallel.tensor",
        2,
        {"parallel__tensor": 2, "model__num_heads": 6, "model__num_kv_heads": 3},
        "parallel.tensor=model.num_kv_heads",
    ),
    "tensor-divides-ffn": ("parallel.tensor", 2, {"parallel__tensor": 2, "model__ffn_size": 49}, "model.ffn_size"),
    "world-size": ("world size", 3, {"parallel__tensor": 2}, "multiple"),
    "global-batch-divides": ("train.global_batch_rows", 3, {}, "train.micro_batch_rows"),
    "eval-rows-divide": ("train.eval_rows", 2, {"train__eval_interval": 1, "train__eval_rows": 3}, "multiple"),
    "interleaving-eval-rows": (
        "train.eval_rows",
        2,
        {
            "parallel__pipeline": 2,
            "parallel__virtual_pipeline": 2,
            "model__num_layers": 4,
            "train__eval_interval": 1,
            "train__eval_rows": 3,
        },
        "parallel.virtual_pipeline=1",
    ),
    "optimizer-needs-whole-matrices": (
        "optimizer.kind",
        1,
        {"optimizer__kind": "matrices"},
        "optimizer.kind=adamw",
    ),
}


@pytest.fixture(autouse=True)
def matrices():
    """An optimizer that needs whole matrices."""

    @OPTIMIZERS.register("matrices")
    class Matrices(AdamW):
        whole_matrices = True

    yield
    OPTIMIZERS.unregister("matrices")


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_refused_with_its_id_field_and_remedy(rule):
    field, world, overrides, remedy = BROKEN[rule]
    recipe = tiny(**overrides)
    mentions = (field, f"{world} process(es)", f"tensor={recipe.parallel.tensor}")
    with raises(ConfigError, rule, *mentions) as refused:  # the first rule of the table that is broken answers
        topology.check(recipe, world)
    assert remedy in refused.value.remedy


def test_the_table_above_has_one_case_per_rule():
    assert list(BROKEN) == [rule.id for rule in topology.RULES]


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
