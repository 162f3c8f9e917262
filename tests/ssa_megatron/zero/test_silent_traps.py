"""Every silent trap of megatron-core and DeepSpeed, sprung on purpose: the comparison with one process must notice each.

A comparison that passes whatever happens would make `test_topologies_equal_one_process.py` worthless. Controls run the same
recipes with nothing sprung. An error is not a difference: it fails the test. Traps that other tests spring: a skipped step and
its learning rate, gradients of one rank that are not finite (`test_precision.py`); Adam's step or working weights not restored
(`test_checkpoint.py`, which looks at every bit after a load); a checkpoint poured into other layers
(`test_checkpoint_topology.py`); bf16 products under Triton's interpreter, which are refused
(`tests/kernels/test_triton_interpreted.py`).
"""

import json
from pathlib import Path

import pytest

from tests.launch import run
from tests.ssa_megatron.parallel.test_topologies_equal_one_process import BF16, ZERO_2, cut
from tests.workers.traps import BROKEN, SPRINGS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ALLOWED = 1e-5  # in bf16 too: these two ranks compute what one computes micro-batch by micro-batch, and sum in fp32
FIGURES = ("loss", "alignment", "norm", "gradient", "parameter")
RECIPES = {
    "sends of an interleaved pipeline are batched": cut(pipeline=2, chunks=2),
    "DeepSpeed accumulates as well": ZERO_2,
    "gradients are not summed over context-parallel ranks": cut(context=2),
    "every rank clips by its own norm": cut(tensor=2),
    "norms under sequence parallelism are not summed": cut(tensor=2, sequence=True),
    "norms are not summed in each micro-batch": ZERO_2 | cut(tensor=2, sequence=True),
    "matrices are not marked as cut": cut(tensor=2),
    "a tied embedding's two gradients are not summed": cut(pipeline=2),
    "a tied embedding counts twice in the norm": cut(pipeline=2),
    "gradients are reduced in bf16": BF16,
    "working weights are not refreshed": BF16,
}


def test_every_spring_is_listed():
    assert RECIPES.keys() == SPRINGS.keys()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traps")
    controls = [{"name": f"control: {trap}", "recipe": recipe} for trap, recipe in RECIPES.items()]
    sprung = [{"name": trap, "recipe": recipe, "trap": trap} for trap, recipe in RECIPES.items()]
    path = folder / "cases.json"
    path.write_text(json.dumps([*controls, *sprung]))
    for world in (1, 2):
        run(world, "tests.workers.topologies", str(folder), str(path), timeout=280)
    return json.loads((folder / "cases.json.out").read_text())


@pytest.mark.parametrize("trap", RECIPES)
def test_the_comparison_notices(found, trap):
    control, sprung = found[f"control: {trap}"], found[trap]
    assert all(control[figure] <= ALLOWED for figure in FIGURES), control
    assert any(not sprung[figure] <= ALLOWED for figure in FIGURES), sprung


@pytest.mark.parametrize("trap", BROKEN)
def test_a_spring_that_raises_is_not_taken_for_a_trap_that_was_noticed(tmp_path, trap):
    """Regression: any exception of a spring counted as noticed, so a misspelt name in one passed."""
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([{"name": trap, "recipe": {}, "trap": trap}]))
    output = run(2, "tests.workers.topologies", str(tmp_path), str(path), timeout=120, expect=1)
    assert "NameError: this spring is broken" in output
    assert not Path(f"{path}.out").exists()
