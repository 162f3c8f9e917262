"""The learning rate as a pure function of applied optimizer steps; one class per schedule.

A skipped step does not advance it, and a resumed run needs only the count. Warm-up is linear from 0, in every schedule. To add
a schedule, add a class here. Imports no torch: reading a recipe imports this module.
"""

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, LiteralString

from ssa_megatron.config.variants import SCHEDULES

if TYPE_CHECKING:
    from ssa_megatron.config import Recipe


def schedule_of(recipe: "Recipe") -> "LearningRate":
    """The recipe's schedule. Raises ConfigError for an unknown name."""
    return SCHEDULES[recipe.schedule.kind](recipe)


class LearningRate(ABC):
    """One schedule of one run. Subclasses define `factor` and register themselves in `config.variants.SCHEDULES`."""

    def __init__(self, recipe: "Recipe"):
        self.settings, self.peak, self.steps = recipe.schedule, recipe.optimizer.lr, recipe.train.steps
        self.warmup = round(self.settings.warmup_fraction * self.steps)

    @classmethod
    def broken_rule(cls, recipe: "Recipe") -> tuple[LiteralString, str] | None:
        """(id, problem) of a rule between fields that the recipe breaks; None if it breaks none."""
        return None

    @abstractmethod
    def factor(self, applied_steps: int) -> float:
        """The rate as a share of the peak, for `applied_steps` in warmup .. steps - 1."""

    def lr(self, applied_steps: int) -> float:
        """The rate of the update that follows `applied_steps` updates; `applied_steps` in 0 .. steps - 1."""
        if applied_steps < self.warmup:
            return self.peak * (applied_steps + 1) / self.warmup
        return self.peak * self.factor(applied_steps)


@SCHEDULES.register("cosine")
class Cosine(LearningRate):
    """Half a cosine from the peak to `min_lr_ratio`."""

    def factor(self, applied_steps: int) -> float:
        floor = self.settings.min_lr_ratio
        progress = (applied_steps - self.warmup) / max(1, self.steps - self.warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@SCHEDULES.register("wsd")
class WarmupStableDecay(LearningRate):
    """The peak, then linear decay to `min_lr_ratio` over the last `decay_fraction` of the steps (arXiv 2404.06395)."""

    def factor(self, applied_steps: int) -> float:
        decay = max(1, round(self.settings.decay_fraction * self.steps))
        progress = min(1.0, max(0, applied_steps - (self.steps - decay)) / decay)
        return 1 - (1 - self.settings.min_lr_ratio) * progress


@SCHEDULES.register("constant")
class Constant(LearningRate):
    """The peak."""

    def factor(self, applied_steps: int) -> float:
        return 1.0
