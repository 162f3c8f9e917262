"""The recipe of a run: typed sections, reading, overriding, resolving."""

from ssa_megatron.config.recipe import digest, dump_recipe, load_recipe, packaged_recipes, resolve
from ssa_megatron.config.sections import Recipe

__all__ = ["Recipe", "digest", "dump_recipe", "load_recipe", "packaged_recipes", "resolve"]
