"""Writes the golden files anew: `python -m tests.golden.regenerate`. Commit them only after reading their diff."""

from ssa_megatron.config import dump_recipe, load_recipe, packaged_recipes
from tests.golden import RECIPES


def main() -> None:
    for stale in RECIPES.glob("*.yaml"):
        stale.unlink()
    for name in packaged_recipes():
        (RECIPES / f"{name}.yaml").write_text(dump_recipe(load_recipe(name)))
        print(RECIPES / f"{name}.yaml")


if __name__ == "__main__":
    main()
