"""Optimizers, one module each: `adamw`. To add one, add a module; see `base.OptimizerKind`."""

from ssa_megatron.config import Recipe
from ssa_megatron.config.variants import OPTIMIZERS
from ssa_megatron.optim.base import OptimizerKind


def optimizer_of(recipe: Recipe) -> OptimizerKind:
    """The recipe's optimizer, with its settings. Raises ConfigError for an unknown name."""
    return OPTIMIZERS[recipe.optimizer.kind](recipe.optimizer)
