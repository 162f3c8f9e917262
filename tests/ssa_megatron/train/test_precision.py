"""Gradients are accumulated and reduced in fp32, masters stay masters, and a step that is not finite never happened."""

import json

import pytest

from tests.launch import run
from tests.workers.gradients_and_skips import SKIPS, ZERO, measure


@pytest.fixture(scope="module")
def found(alone, tmp_path_factory) -> dict:
    """{data-parallel size: measurements}; 1 in this process, 2 in two."""
    out = tmp_path_factory.mktemp("precision") / "two.json"
    run(2, "tests.workers.gradients_and_skips", str(out), timeout=120)
    return {1: measure(alone), 2: json.loads(out.read_text())}


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_gradient_at_the_optimizers_step_is_the_fp64_sum_of_the_micro_batch_gradients(
    found, zero, ranks, precision
):
    """16 micro-batches; bf16 accumulation is 8e-3 off, fp32 accumulation with a bf16 all-reduce 2e-3."""
    values = found[ranks][f"gradients {precision} {zero}"]
    assert values["gradient"] <= 1e-6
    assert values["norm"] <= 1e-6
    assert values["elements"] == values["parameters"], "the fragments of all ranks are the whole model"


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_step_refreshes_the_working_weights_from_the_masters_on_every_rank(found, zero, ranks, precision):
    values = found[ranks][f"gradients {precision} {zero}"]
    assert values["applied"]
    assert values["moved"]
    assert values["working equals masters"]
    assert values["equal on all ranks"]


@pytest.mark.parametrize(("zero", "precision"), SKIPS)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_non_finite_loss_or_gradient_on_one_rank_skips_the_step_on_all_of_them(found, zero, ranks, precision, kind):
    values = found[ranks][f"skip {kind} {precision} {zero}"]
    assert values["first"]["applied"]
    assert len(values["bad"]) == ranks
    for seen in values["bad"]:
        assert seen == values["bad"][0]
        assert seen["applied"] == "False"
        assert seen["grad_norm"] == "inf"
        assert (seen["loss"] in ("nan", "inf")) == (kind == "loss")
    assert values["unchanged"], "weights, masters, moments and Adam's step are those before"


@pytest.mark.parametrize(("zero", "precision"), SKIPS)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_training_goes_on_after_a_skip_as_if_the_step_had_not_been(found, zero, ranks, precision, kind):
    assert found[ranks][f"skip {kind} {precision} {zero}"]["goes on as if it had not been"]


def test_sequence_parallel_norms_are_summed_in_fp32_before_the_step(tmp_path):
    """Two tensor-parallel ranks, each with half the tokens of every norm: forgetting the sum halves their gradients."""
    out = tmp_path / "tensor.json"
    run(2, "tests.workers.gradients_and_skips", str(out), "tensor", timeout=120)
    for case, values in json.loads(out.read_text()).items():
        assert values["gradient"] <= 1e-6, case
        assert values["working equals masters"], case
