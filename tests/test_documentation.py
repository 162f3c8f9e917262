"""What the documentation says can be typed and found: commands parse, recipes load, links, tests and citations exist.

READMEs also keep their limits: 120 lines of 120 characters, and short sentences in the root README.
"""

import importlib.util
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
import typer

from ssa_megatron.cli import app
from ssa_megatron.config import load_recipe
from ssa_megatron.config.variants import KINDS, OPTIMIZERS
from ssa_megatron.planning import hardware, search
from tests import launch

ROOT = launch.ROOT
READMES = [ROOT / "README.md", *(ROOT / name / "README.md" for name in ("kernels", "pipelines", "cluster"))]
READMES += sorted((ROOT / "ssa_megatron").rglob("README.md"))
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCUMENTS = [*READMES, *PAGES, *sorted((ROOT / "cluster" / "failures").glob("*.md"))]
SOURCES = [
    path
    for folder in ("ssa_megatron", "kernels", "pipelines", "cluster", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
COMMAND = re.compile(r"^(?:\$ )?(?:python -m ssa_megatron|ssa|torchrun .*?-m ssa_megatron) (.*)$")
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands(document: Path) -> list[list[str]]:
    """Arguments of every `ssa` command in a document's code blocks, continuation lines joined."""
    found = []
    for block in FENCED.findall(document.read_text()):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            match = COMMAND.match(line.strip())
            if match:
                found.append(shlex.split(match[1], comments=True))
    return found


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    text = FENCED.sub("", document.read_text())
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sentences(document: Path) -> list[str]:
    """The sentences of a document's prose and lists. Code, tables, headings and pictures are left out; a link is its text."""
    text = FENCED.sub("\n\n", document.read_text())
    text = re.sub(r"^(?:[#|!<]| {4}).*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "Code", text))
    paragraphs = re.split(r"\n\s*\n|\n\s*(?=(?:[*-]|\d+\.) )", text)
    flat = [re.sub(r"^(?:[*-]|\d+\.) ", "", " ".join(paragraph.split())) for paragraph in paragraphs]
    found = [one for paragraph in flat for one in re.split(r"(?<=[.?!:])[*]*\s+(?=[A-Z*`\d])", paragraph)]
    return [one for one in found if re.search(r"\w", one)]


def words_per_sentence(document: Path) -> float:
    return statistics.mean(len(re.findall(r"[\w'./-]*\w[\w'./-]*", sentence)) for sentence in sentences(document))


CASES = [(document, arguments) for document in DOCUMENTS for arguments in commands(document)]


@pytest.mark.parametrize(("document", "arguments"), CASES, ids=[" ".join(arguments)[:60] for _, arguments in CASES])
def test_every_command_parses(document, arguments):
    command, context = typer.main.get_command(app), None
    rest = list(arguments)
    while hasattr(command, "get_command"):
        name = rest.pop(0)
        parent, command = command, command.get_command(context, name)
        assert command is not None, f"{document}: {parent.name or 'ssa'} has no verb {name!r}"
    parsed = command.make_context(command.name, rest)
    if "recipe" in parsed.params:
        load_recipe(parsed.params["recipe"], parsed.params.get("overrides") or ())


def test_the_root_readme_shows_commands_at_all():
    assert len(commands(ROOT / "README.md")) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_every_link_leads_to_a_file_and_a_heading(document):
    text = FENCED.sub("", document.read_text())
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text):
        path = document.parent / target if target else document
        assert path.exists(), f"links to {target}"
        assert not anchor or anchor in anchors(path), f"links to {target}#{anchor}"


@pytest.mark.parametrize("document", [ROOT / "docs" / "guarantees.md", *DOCUMENTS], ids=relative)
def test_every_named_test_exists(document):
    names = set(re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py|tests/[\w/]+/)`", document.read_text()))
    assert len(names) >= 20 or document.name != "guarantees.md"
    for name in names:
        assert list(ROOT.glob(name if "/" in name else f"tests/**/{name}")), name


@pytest.mark.parametrize("document", READMES, ids=relative)
def test_every_path_of_a_readme_exists(document):
    """Paths in the first column of a map, relative to the README's folder or to the folder of the row's file before it."""
    text = document.read_text().partition("## Map\n")[2].partition("\n## ")[0]
    for row in re.findall(r"^\| (`.*?) \|", text, re.MULTILINE):
        folder = document.parent
        for name in re.findall(r"`([\w./*-]+)`", row):
            found = list(document.parent.glob(name)) or list(folder.glob(name))
            assert found, f"{name} in the map of {relative(document)}"
            folder = found[0].parent


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/quickstart.md", "docs/performance.md"])
def test_every_makefile_target_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|^|&& )make ([a-z-]+)", (ROOT / name).read_text(), re.MULTILINE))
    assert named
    assert named <= targets


@pytest.mark.parametrize("document", READMES, ids=relative)
def test_a_readme_is_short(document):
    lines = document.read_text().splitlines()
    assert len(lines) <= 120
    assert [line for line in lines if len(line) > 120] == []


def test_the_sentences_of_the_root_readme_are_short():
    assert len(sentences(ROOT / "README.md")) > 20
    assert words_per_sentence(ROOT / "README.md") <= 18


def test_every_function_of_the_tour_exists():
    """Each name in backticks of "Follow one batch" is defined in one of the files that its row links."""
    tour = (ROOT / "CONTRIBUTING.md").read_text().partition("## Follow one batch")[2].partition("\n## ")[0]
    places = [line.rsplit("|", 2)[1] for line in tour.splitlines() if re.match(r"\| \d", line)]
    assert len(places) >= 15
    for place in places:
        text = "".join((ROOT / path).read_text() for path in re.findall(r"\]\(([^)]+\.py)\)", place))
        for name in re.findall(r"`([\w.]+)`", place):
            for part in name.split("."):
                assert re.search(rf"(?:class|def) {part}\b", text) or "StepRunner" in name, f"{name} in: {place}"


@pytest.mark.parametrize(
    ("registry", "name", "override"),
    [(KINDS, "mixed", "attention.kind=mixed"), (OPTIMIZERS, "sgd", "optimizer.kind=sgd")],
    ids=["attention kind", "optimizer"],
)
def test_the_variants_of_contributing_are_complete(registry, name, override):
    """The examples register, a recipe may name them, and they can be planned."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL | re.MULTILINE)
    example = next(block for block in blocks if f'register("{name}")' in block)
    try:
        exec(example, {})
        recipe = load_recipe("demo", [override])
        plan = search.evaluate(recipe, 1, hardware.find("h100"))
        assert plan.stages[0].phases
        if registry is OPTIMIZERS:
            weight = torch.nn.Parameter(torch.ones(2, 2))
            optimizer = registry[name](recipe.optimizer).build([weight], fused=False)
            weight.grad = torch.ones(2, 2)
            optimizer.step()
            assert "momentum_buffer" in optimizer.state[weight]
        else:
            assert registry[name](recipe.attention).gates == 2
    finally:
        registry.unregister(name)


def test_every_page_that_the_code_cites_has_the_section():
    cited = 0
    for path in SOURCES:
        text = path.read_text()
        if path == Path(__file__):
            continue
        assert not re.search(r"(?<![\w/])method\.md", text), f"{relative(path)} cites method.md without docs/"
        for page, section in re.findall(r'docs/([\w-]+\.md)`?(?:, "([^"]+)"|, step \d)?', text):
            cited += 1
            assert (ROOT / "docs" / page).exists(), f"{relative(path)} cites docs/{page}"
            found = (ROOT / "docs" / page).read_text()
            assert not section or f"# {section}\n" in found, f'{relative(path)} cites "{section}" of docs/{page}'
        for step in re.findall(r"docs/method\.md, step (\d)", text):
            assert f"\n{step}. **" in (ROOT / "docs" / "method.md").read_text()
    assert cited >= 10


def test_the_picture_of_the_root_readme_is_that_of_its_data(tmp_path):
    script = ROOT / "docs" / "figures" / "quality_and_cost.py"
    spec = importlib.util.spec_from_file_location("quality_and_cost", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.quality()["ssa"][2] == (4, 0.0042)
    assert len(module.cost()["sparse with routing"]) == 8
    module.draw(tmp_path / "picture.svg")
    committed = module.PICTURE.read_text()
    made_with = re.search(r"Matplotlib v([\d.]+)", committed)[1]
    if made_with == matplotlib.__version__:  # another release may place a label elsewhere
        assert (tmp_path / "picture.svg").read_text() == committed, f"run: python {relative(script)}"


def test_transformers_works_beside_our_package_named_kernels():
    """`kernels` is also the name of a Hugging Face package that transformers looks for."""
    code = "import ssa_kernels, transformers; from transformers import LlamaForCausalLM; print(ssa_kernels.BlockSpec())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "BlockSpec" in done.stdout
