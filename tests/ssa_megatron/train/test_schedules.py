"""The learning rate: its shape, its end points, and that it needs nothing but a count."""

import itertools
import math

import pytest

from ssa_megatron.config.variants import SCHEDULES
from ssa_megatron.errors import ConfigError
from ssa_megatron.train.schedules import schedule_of
from tests.errors import raises
from tests.ssa_megatron.support import tiny
from tests.ssa_megatron.toys import registered

PEAK = 2e-3


def rates(kind: str, steps: int = 100, **schedule) -> list[float]:
    fields = {f"schedule__{name}": value for name, value in schedule.items()}
    recipe = tiny(schedule__kind=kind, train__steps=steps, optimizer__lr=PEAK, **fields)
    schedule = schedule_of(recipe)
    return [schedule.lr(applied) for applied in range(steps)]


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


def test_rates_are_those_of_release_0_1_0_bit_for_bit():
    def released(
        kind: str, applied: int, steps: int, warmup_fraction: float, decay_fraction: float, floor: float
    ) -> float:
        warmup = round(warmup_fraction * steps)
        if applied < warmup:
            return PEAK * (applied + 1) / warmup
        if kind == "cosine":
            progress = (applied - warmup) / max(1, steps - warmup)
            return PEAK * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
        if kind == "wsd":
            decay = max(1, round(decay_fraction * steps))
            progress = min(1.0, max(0, applied - (steps - decay)) / decay)
            return PEAK * (1 - (1 - floor) * progress)
        return PEAK

    for kind, steps, warmup, decay, floor in itertools.product(
        ("cosine", "wsd", "constant"), (1, 7, 333), (0.0, 0.01, 0.37), (0.0, 0.2, 0.9), (0.0, 0.1, 0.3)
    ):
        found = rates(kind, steps, warmup_fraction=warmup, decay_fraction=decay, min_lr_ratio=floor)
        assert found == [released(kind, applied, steps, warmup, decay, floor) for applied in range(steps)]


def test_a_new_schedule_gives_rates_and_refuses_what_it_cannot_do():
    with registered():
        assert rates("halving", 4, warmup_fraction=0.5) == [PEAK / 2, PEAK, PEAK, PEAK / 2]
        with raises(ConfigError, "halving-has-no-floor", "schedule.min_lr_ratio"):
            rates("halving", min_lr_ratio=0.1)


def test_an_unknown_schedule_is_refused_where_the_recipe_is_read():
    with raises(ConfigError, "unknown-variant-name", "schedule.kind", "cosine", "'exponential'"):
        tiny(schedule__kind="exponential")


def test_an_unknown_schedule_raises_where_it_is_first_asked_for():
    with registered():
        recipe = tiny(schedule__kind="halving")
    assert "halving" not in SCHEDULES
    with raises(ConfigError, "unknown-variant", "schedule.kind=halving"):
        schedule_of(recipe)
