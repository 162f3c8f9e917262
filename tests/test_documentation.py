"""What the READMEs say can be typed and found: commands parse as written, recipes load, named files exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from ssa_megatron.cli import app
from ssa_megatron.config import load_recipe
from tests import launch

DOCUMENTS = sorted(
    path for path in launch.ROOT.rglob("README.md") if ".venv" not in path.parts and "runs" not in path.parts
)
COMMAND = re.compile(r"^(?:\$ )?(?:python -m ssa_megatron|ssa|torchrun .*?-m ssa_megatron) (.*)$")


def commands(document: Path) -> list[list[str]]:
    """Arguments of every `ssa` command in a document's code blocks, continuation lines joined."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            match = COMMAND.match(line.strip())
            if match:
                found.append(shlex.split(match[1]))
    return found


CASES = [(document, arguments) for document in DOCUMENTS for arguments in commands(document)]


@pytest.mark.parametrize(("document", "arguments"), CASES, ids=[" ".join(arguments)[:60] for _, arguments in CASES])
def test_every_command_of_a_readme_parses(document, arguments):
    command, context = typer.main.get_command(app), None
    rest = list(arguments)
    while hasattr(command, "get_command"):
        name = rest.pop(0)
        parent, command = command, command.get_command(context, name)
        assert command is not None, f"{document}: {parent.name or 'ssa'} has no verb {name!r}"
    parsed = command.make_context(command.name, rest)
    if "recipe" in parsed.params:
        load_recipe(parsed.params["recipe"], parsed.params.get("overrides") or ())


def test_the_readme_shows_commands_at_all():
    assert len(commands(launch.ROOT / "README.md")) >= 5


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(launch.ROOT)))
def test_every_link_to_a_file_leads_somewhere(document):
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), f"{document} links to {target}"


def test_every_test_named_in_the_readme_exists():
    names = re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py|tests/\w+/)`", (launch.ROOT / "README.md").read_text())
    assert len(names) >= 6
    for name in names:
        path = launch.ROOT / name if name.startswith("tests/") else launch.ROOT / "tests/ssa_megatron" / name
        assert path.exists(), name


def test_transformers_works_beside_our_package_named_kernels():
    """`kernels` is also the name of a Hugging Face package that transformers looks for."""
    code = "import ssa_kernels, transformers; from transformers import LlamaForCausalLM; print(ssa_kernels.BlockSpec())"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, cwd=launch.ROOT, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "BlockSpec" in done.stdout


def test_every_makefile_target_of_the_readmes_exists():
    targets = set(re.findall(r"^([a-z-]+):", (launch.ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in (launch.ROOT / "README.md", launch.ROOT / "CONTRIBUTING.md"):
        for name in re.findall(r"`make ([a-z-]+)`", document.read_text()):
            assert name in targets, f"{document.name} names `make {name}`"
