"""The plan against the trainer itself (bytes held, sent, kept for backward), and its arithmetic where no trainer is at hand."""

import json
from collections.abc import Iterator

import pytest

from ssa_megatron.config import load_recipe
from ssa_megatron.model.shapes import padded_vocab_size, parameter_count
from ssa_megatron.planning import activations
from ssa_megatron.planning.communication import traffic
from ssa_megatron.planning.memory import in_flight, memory
from ssa_megatron.planning.rank_shapes import parameters, rank_shapes
from tests.launch import run
from tests.ssa_megatron import toy_kind
from tests.ssa_megatron.support import tiny
from tests.workers.saved_activations import CASES, DOCUMENT, recipe_of

BF16 = {"train__precision": "bf16"}
TENSOR = {**BF16, "parallel__tensor": 2}
SEQUENCE = {**TENSOR, "parallel__sequence": True, "train__sequence_length": 34}
ROW = {"train__sequence_length": 32}
ODD = {"model__hidden_size": 30, "model__ffn_size": 47, "model__vocab_size": 51}
REAL = [  # processes, what they run one after the other
    (1, [{**BF16, "model__tied_embeddings": False}]),
    (2, [{**BF16, **ODD}, {**BF16, "zero__stage": 2}, {**BF16, "zero__stage": 3}]),
    (2, [TENSOR, {**SEQUENCE, "train__recompute": "full", "model__tied_embeddings": False}]),
    (2, [{**BF16, "parallel__pipeline": 2}, {**BF16, "parallel__pipeline": 2, "model__tied_embeddings": False}]),
    (2, [{**BF16, **ROW, "parallel__context": 2}, {**BF16, **ROW, "parallel__context": 2, "train__recompute": "full"}]),
]


@pytest.mark.parametrize(("world", "rows"), REAL, ids=["one process", "data 2", "tensor 2", "pipeline 2", "context 2"])
def test_states_and_traffic_are_the_trainers_to_the_byte(world, rows, tmp_path):
    run(world, "tests.workers.planned_and_real", str(tmp_path), json.dumps(rows), timeout=240)
    for rank in range(world):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        for overrides, real in zip(rows, found, strict=True):
            recipe = tiny(**overrides)
            stage = rank if recipe.parallel.pipeline > 1 else 0
            planned = memory(recipe, world)[stage]
            assert {item: planned.states[item] for item in real["held"]} == real["held"], overrides
            for operation, sent in real["payloads"].items():
                of_it = [t for t in traffic(recipe, world, stage) if t.operation == operation]
                assert sum(t.payload for t in of_it) == sent, (overrides, of_it)


@pytest.fixture
def toy() -> Iterator[None]:
    with toy_kind.registered():
        yield


def test_activations_are_those_autograd_keeps_to_the_byte(tmp_path, toy):
    out = tmp_path / "kept.json"
    run(1, "tests.workers.saved_activations", str(out), timeout=240, TRITON_INTERPRET="1")
    for case, kept in zip(CASES, json.loads(out.read_text()), strict=True):
        recipe = recipe_of(*case, layers=2)
        c = rank_shapes(recipe, 1, document=DOCUMENT)
        assert sum(activations.layer(recipe, c, recipe.train.recompute).values()) == kept["layer"], case
        if recipe.train.recompute == "none":
            # beside the head: the rotary table; the tokens and where their documents begin, which belong to the batch
            rest = sum(activations.head(c).values()) + activations.batch(recipe, c) + (8 + 4) * c.tokens
            assert rest == kept["rest"], case


@pytest.mark.parametrize(
    ("tied", "pipeline", "tensor"), [(True, 1, 1), (False, 1, 4), (True, 2, 1), (True, 4, 8), (False, 4, 2)]
)
def test_stages_and_ranks_together_hold_the_model(tied, pipeline, tensor):
    overrides = [f"parallel.pipeline={pipeline}", f"parallel.tensor={tensor}", f"model.tied_embeddings={tied}"]
    recipe = load_recipe("ssa-70b-128k", [*overrides, "model.vocab_size=128253"])
    m = recipe.model
    held = [parameters(recipe, stage) for stage in range(pipeline)]
    matrices, norms = tensor * sum(sum(h.matrices) for h in held), sum(sum(h.vectors) for h in held)
    copies = 1 if tied and pipeline == 1 else 2
    extra = (copies * padded_vocab_size(recipe) - (1 if tied else 2) * m.vocab_size) * m.hidden_size
    assert matrices + norms == parameter_count(recipe) + extra


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches", "first", "last"),
    [(1, 1, 8, 1, 1), (4, 1, 16, 4, 1), (4, 1, 2, 2, 1), (4, 2, 16, 5.5, 2.5), (8, 5, 64, 9.4, 6.6)],
)
def test_micro_batches_in_flight_are_those_of_1f1b(pipeline, virtual, micro_batches, first, last):
    cuts = [f"parallel.pipeline={pipeline}", f"parallel.virtual_pipeline={virtual}"]
    recipe = load_recipe("ssa-70b-128k", [*cuts, f"train.global_batch_rows={micro_batches}"])
    c = rank_shapes(recipe, 8 * 16 * pipeline)
    assert (in_flight(recipe, c, 0), in_flight(recipe, c, pipeline - 1)) == (first, last)


def test_every_cut_saves_what_it_is_made_for():
    whole = load_recipe("ssa-8b", ["parallel.tensor=1", "parallel.sequence=false"])

    def with_(section, **fields):
        return whole.model_copy(update={section: getattr(whole, section).model_copy(update=fields)})

    base = memory(whole, 8)[0]
    two, three = (memory(with_("zero", stage=stage), 8)[0].states for stage in (2, 3))
    for name in ("masters (fp32)", "moments (fp32)"):
        assert memory(whole, 16)[0].states[name] == pytest.approx(base.states[name] / 2, rel=1e-6)
    assert two["gradients (fp32)"] == pytest.approx(base.states["gradients (fp32)"] / 8, rel=1e-6)
    assert three["weights"] == pytest.approx(base.states["weights"] / 8, rel=1e-6)
    kept = {mode: sum(memory(with_("train", recompute=mode), 8)[0].kept.values()) for mode in ("selective", "full")}
    assert kept["full"] < kept["selective"] < sum(base.kept.values())
    context = memory(with_("parallel", context=8), 8)[0]
    assert context.kept["MLP"] == base.kept["MLP"] // 8
    assert context.kept["q, k, v"] > base.kept["q, k, v"] // 8, "keys and values are gathered"
    tensor = memory(with_("parallel", tensor=2), 8)[0]
    assert tensor.kept["norms"] == base.kept["norms"]
    assert memory(with_("parallel", tensor=2, sequence=True), 8)[0].kept["norms"] < 0.51 * base.kept["norms"]


def test_a_key_value_head_shared_by_ranks_is_kept_by_each():
    eight, sixteen = (rank_shapes(load_recipe("ssa-70b-128k", [f"parallel.tensor={t}"]), 1024) for t in (8, 16))
    assert (eight.key, sixteen.key) == (128, 128)
    assert sixteen.query == eight.query // 2
