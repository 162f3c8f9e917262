"""Global names: the blocks of all ranks tile every global tensor exactly once, and the weights do not depend on the cut."""

import json

import pytest
import torch

from ssa_megatron.model.shapes import global_shapes
from tests.launch import run
from tests.oracle.model import OracleConfig, weight_shapes
from tests.ssa_megatron.support import tiny
from tests.workers.parameter_blocks import CASES, describe


@pytest.fixture(scope="module")
def found(alone, tmp_path_factory) -> dict:
    """{tensor-parallel size: {case: description}}; 1 in this process, 2 in two."""
    out = tmp_path_factory.mktemp("blocks") / "two.json"
    run(2, "tests.workers.parameter_blocks", str(out), "2", timeout=120)
    one = json.loads(json.dumps({case: describe(case, alone) for case in CASES}))
    return {1: one, 2: json.loads(out.read_text())}


def recipe_of(case: str, tensor: int):
    return tiny(**CASES[case], parallel__tensor=tensor)


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_blocks_of_all_ranks_tile_every_global_tensor_exactly_once(found, case, tensor):
    shapes = global_shapes(recipe_of(case, tensor))
    times = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    ranks = found[tensor][case]["ranks"]
    assert len(ranks) == tensor
    for rank, parameters in enumerate(ranks):
        for parameter in parameters:
            if parameter["replicated"] and rank > 0:
                continue
            for name, global_shape, offset, shape, _ in parameter["blocks"]:
                assert tuple(global_shape) == shapes[name]
                times[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] += 1
    for name, count in times.items():
        assert (count == 1).all(), name


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_the_blocks_of_a_parameter_fill_it_without_overlap_but_for_the_vocabularys_padding(found, case, tensor):
    recipe = recipe_of(case, tensor)
    padding = 0
    for parameters in found[tensor][case]["ranks"]:
        for parameter in parameters:
            used = torch.zeros(parameter["numel"], dtype=torch.int)
            for _, _, _, shape, start in parameter["blocks"]:
                size = int(torch.tensor(shape).prod())
                assert start + size <= parameter["numel"]
                used[start : start + size] += 1
            assert used.max() == 1
            padding += int((used == 0).sum())
    matrices = 1 if recipe.model.tied_embeddings else 2
    assert padding == -recipe.model.vocab_size % tensor * recipe.model.hidden_size * matrices


@pytest.mark.parametrize("case", CASES)
def test_replicated_parameters_are_the_norms_and_are_whole_on_every_rank(found, case):
    for parameters in found[2][case]["ranks"]:
        names = {p["blocks"][0][0] for p in parameters if p["replicated"]}
        assert names == {name for name in global_shapes(recipe_of(case, 2)) if name.endswith("norm.weight")}
        for parameter in parameters:
            if parameter["replicated"]:
                [(_, global_shape, offset, shape, start)] = parameter["blocks"]
                assert (shape, offset, start) == (global_shape, [0], 0)


@pytest.mark.parametrize("case", CASES)
def test_the_initial_weights_do_not_depend_on_the_cut(found, case):
    assert found[1][case]["sha256"] == found[2][case]["sha256"]


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_the_independent_model(case):
    recipe = recipe_of(case, 1)
    m = recipe.model
    config = OracleConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        ffn_size=m.ffn_size,
        tied=m.tied_embeddings,
        kind=recipe.attention.kind,
    )
    assert global_shapes(recipe) == weight_shapes(config)


def test_one_process_holds_every_element_once(found):
    for case in CASES:
        elements = sum(torch.Size(shape).numel() for shape in global_shapes(recipe_of(case, 1)).values())
        assert found[1][case]["count"] == elements
