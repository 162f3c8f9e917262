"""The learning rate: its shape, its end points, and that it needs nothing but a count."""

import itertools
import math

import pytest

from ssa_megatron.train.schedules import learning_rate
from tests.ssa_megatron.support import tiny

PEAK = 2e-3


def rates(kind: str, steps: int = 100, **schedule) -> list[float]:
    fields = {f"schedule__{name}": value for name, value in schedule.items()}
    recipe = tiny(schedule__kind=kind, train__steps=steps, optimizer__lr=PEAK, **fields)
    return [learning_rate(recipe, applied) for applied in range(steps)]


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_rises_linearly_from_above_zero_to_the_peak(kind):
    found = rates(kind, warmup_fraction=0.1)
    assert found[:10] == pytest.approx([PEAK * (i + 1) / 10 for i in range(10)])
    assert found[10] == pytest.approx(PEAK)


def test_cosine_falls_from_the_peak_to_the_floor_through_their_middle():
    found = rates("cosine", steps=1000, warmup_fraction=0.0, min_lr_ratio=0.1)
    assert found[0] == PEAK
    assert found[500] == pytest.approx(PEAK * 0.55)
    assert found[250] == pytest.approx(PEAK * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))
    assert PEAK * 0.1 < found[-1] < PEAK * 0.1001
    assert all(a > b for a, b in itertools.pairwise(found))


def test_cosine_to_zero_still_moves_at_its_last_step():
    assert 0 < rates("cosine", steps=1000, warmup_fraction=0.01)[-1] < 1e-5 * PEAK


def test_wsd_stays_at_the_peak_and_decays_linearly_at_the_end():
    found = rates("wsd", warmup_fraction=0.1, decay_fraction=0.2, min_lr_ratio=0.5)
    assert found[10:81] == [PEAK] * 71
    assert found[80:] == pytest.approx([PEAK * (1 - 0.5 * i / 20) for i in range(20)])


def test_constant_stays_at_the_peak():
    assert rates("constant", warmup_fraction=0.0) == [PEAK] * 100


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_a_run_of_very_few_steps_has_rates_between_zero_and_the_peak(kind, steps, warmup):
    assert all(0 < rate <= PEAK for rate in rates(kind, steps, warmup_fraction=warmup))
