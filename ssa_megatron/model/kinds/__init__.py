"""Attention kinds, one module each: `full`, `moba`, `nsa`, `ssa`. To add one, add a module; see `base.AttentionKind`."""

from ssa_megatron.config import Recipe
from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.kinds.base import AttentionKind


def kind_of(recipe: Recipe) -> AttentionKind:
    """The recipe's attention kind, with its settings. Raises ConfigError for an unknown name."""
    return KINDS[recipe.attention.kind](recipe.attention)
