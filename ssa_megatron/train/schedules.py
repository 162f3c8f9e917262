"""The learning rate as a pure function of applied optimizer steps.

A skipped step does not advance it, and a resumed run needs nothing but the count. Warm-up is linear from 0.
"""

import math

from ssa_megatron.config import Recipe


def learning_rate(recipe: Recipe, applied_steps: int) -> float:
    """The rate of the update that follows `applied_steps` updates; `applied_steps` in 0 .. train.steps - 1."""
    schedule, peak, total = recipe.schedule, recipe.optimizer.lr, recipe.train.steps
    warmup = round(schedule.warmup_fraction * total)
    if applied_steps < warmup:
        return peak * (applied_steps + 1) / warmup
    floor = schedule.min_lr_ratio
    if schedule.kind == "cosine":
        progress = (applied_steps - warmup) / max(1, total - warmup)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))
    if schedule.kind == "wsd":
        decay = max(1, round(schedule.decay_fraction * total))
        progress = min(1.0, max(0, applied_steps - (total - decay)) / decay)
        return peak * (1 - (1 - floor) * progress)
    return peak
