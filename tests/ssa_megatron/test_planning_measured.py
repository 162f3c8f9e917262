"""The plan against what one H100 measured: three shapes, three recompute modes, two layouts of rows."""

import json
from pathlib import Path

import pytest

import ssa_megatron.planning
from ssa_megatron.config import load_recipe
from ssa_megatron.planning import hardware, search

LINES = (Path(ssa_megatron.planning.__file__).parent / "measured-h100.jsonl").read_text().splitlines()
MEASURED = [json.loads(line) for line in LINES]
NAMES = [f"{m['recipe']} {' '.join(m['overrides'])} document={m['document']}" for m in MEASURED]


def planned(measured: dict) -> search.Candidate:
    recipe = load_recipe(measured["recipe"], measured["overrides"])
    return search.evaluate(recipe, 1, hardware.find("h100"), document=measured["document"])


@pytest.mark.parametrize("measured", MEASURED, ids=NAMES)
def test_memory_is_within_a_percent_and_activations_within_three(measured):
    [stage] = planned(measured).stages
    backward = max(value for phase, value in stage.phases.items() if phase != "step")
    assert backward == pytest.approx(measured["backward_peak"], rel=0.01)
    states = sum(stage.states.values())
    assert backward - states == pytest.approx(measured["backward_peak"] - states, rel=0.03)
    if "step_peak" in measured:
        assert stage.phases["step"] == pytest.approx(measured["step_peak"], rel=0.01)


@pytest.mark.parametrize(
    "measured",
    [m for m in MEASURED if "seconds" in m],
    ids=[n for n, m in zip(NAMES, MEASURED, strict=True) if "seconds" in m],
)
def test_time_is_within_a_tenth(measured):
    assert planned(measured).speed.seconds == pytest.approx(measured["seconds"], rel=0.1)
