"""The parts of docs/ that come from code: the table of legal combinations and an example plan.

`python -m ssa_megatron.planning.table` writes them into the pages, between markers; a test fails while a page is out of date. It
needs a checkout: the pages are not installed.
"""

from collections.abc import Callable
from pathlib import Path

from ssa_megatron.config import load_recipe
from ssa_megatron.parallel.topology import RULES
from ssa_megatron.planning import hardware, search
from ssa_megatron.planning import plan_page as page

DOCS = Path(__file__).resolve().parents[2] / "docs"
RECIPE, WORLD, DOCUMENT, TOP = "ssa-8b", 64, 2048, 5


def rules() -> str:
    """One table row per rule, in the order in which they are checked."""
    rows = [f"| `{rule.fields}` | {rule.reason} | {rule.remedy} |" for rule in RULES]
    return "\n".join(("| field | refused, because | works instead |", "|---|---|---|", *rows))


def example() -> str:
    """What `ssa plan` prints for one recipe, without the disk of the machine it runs on."""
    recipe, gpu = load_recipe(RECIPE), hardware.find("h100")
    plan = search.evaluate(recipe, WORLD, gpu, document=DOCUMENT)
    best = search.ranked(search.fitting(recipe, WORLD, gpu, document=DOCUMENT))[:TOP]
    command = f"ssa plan {RECIPE} --world {WORLD} --document {DOCUMENT}"
    return f"```\n$ {command}\n{page.render(plan, best, gpu, None)}\n```"


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "parallelism.md": ("rules", rules),
    "planner.md": ("example", example),
}
"""The generated section of each page: marker and content."""


def updated(name: str) -> str:
    """The text of page `name` with its generated section replaced by today's. Raises ValueError when a marker is missing."""
    text, (marker, content) = (DOCS / name).read_text(), SECTIONS[name]
    begin, end = f"<!-- {marker}: python -m ssa_megatron.planning.table -->", f"<!-- end of {marker} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{DOCS / name}: the section {begin} ... {end} is missing")
    return f"{before}{begin}\n{content()}\n{end}{after}"


if __name__ == "__main__":
    for page_name in SECTIONS:
        (DOCS / page_name).write_text(updated(page_name))
