"""What ssa_megatron/README.md shows of the planning code: the compatibility table and an example, generated.

`python -m ssa_megatron.planning.table` brings the README up to date; a test fails while it is not.
"""

from pathlib import Path

from ssa_megatron.config import load_recipe
from ssa_megatron.parallel.topology import RULES
from ssa_megatron.planning import hardware, search
from ssa_megatron.planning import plan_page as page

README = Path(__file__).resolve().parents[1] / "README.md"
RECIPE, WORLD, DOCUMENT, TOP = "ssa-8b", 64, 2048, 5


def rules() -> str:
    """One row a rule, in the order they are asked."""
    rows = [f"| `{rule.fields}` | {rule.reason} | {rule.remedy} |" for rule in RULES]
    return "\n".join(("| field | refused, because | works instead |", "|---|---|---|", *rows))


def example() -> str:
    """What `ssa plan` prints for one recipe, but for the disk of the machine it runs on."""
    recipe, gpu = load_recipe(RECIPE), hardware.find("h100")
    plan = search.evaluate(recipe, WORLD, gpu, document=DOCUMENT)
    best = search.ranked(search.fitting(recipe, WORLD, gpu, document=DOCUMENT))[:TOP]
    command = f"ssa plan {RECIPE} --world {WORLD} --document {DOCUMENT}"
    return f"```\n$ {command}\n{page.render(plan, best, gpu, None)}\n```"


def updated(text: str) -> str:
    """`text` with what is between the markers of each section replaced by today's."""
    for name, content in (("rules", rules()), ("example", example())):
        begin, end = f"<!-- {name}: python -m ssa_megatron.planning.table -->", f"<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.partition(end)[2]}"
    return text


if __name__ == "__main__":
    README.write_text(updated(README.read_text()))
