"""Every error that a user can act on has an id: kebab-case, and one rule per id within a package.

Scripts and tests depend on ids, so an id that two rules share, or a rule without one, fails here. Ids are read from the source.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssa_cluster.errors
import ssa_megatron.errors
import ssa_pipelines.errors

PACKAGES = {
    "ssa_megatron": ssa_megatron.errors.SSAError,
    "ssa_pipelines": ssa_pipelines.errors.DataError,
    "ssa_cluster": ssa_cluster.errors.ClusterError,
}
RULES = ("Rule", "_broken", "PydanticCustomError")  # their first argument becomes the id of a ConfigError


def _calls(package: str) -> Iterator[tuple[str, str, ast.Call]]:
    """Each call in the package: its position, the name called, and the call."""
    folder = Path(__import__(package).__file__).parent
    for path in sorted(folder.rglob("*.py")):
        if (
            path.name == "errors.py" or "bundle" in path.parts
        ):  # the files that travel with a model depend on transformers alone
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                yield f"{path.relative_to(folder)}:{node.lineno}", name, node


def _id_expressions(package: str) -> Iterator[tuple[str, ast.expr | None]]:
    """The id of each error that the package makes, with its position; None for an error without one."""
    classes = {kind.__name__ for kind in _and_subclasses(PACKAGES[package])} | {"BadRecord"}  # becomes a CorpusError
    for position, name, call in _calls(package):
        if name in classes:
            yield position, next((keyword.value for keyword in call.keywords if keyword.arg == "id"), None)
        elif name in RULES and call.args:
            yield position, call.args[0]


def _and_subclasses(kind: type) -> list[type]:
    return [kind, *(below for child in kind.__subclasses__() for below in _and_subclasses(child))]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_error_has_an_id(package):
    found = list(_id_expressions(package))
    assert len(found) > 20
    assert not [position for position, value in found if value is None]


@pytest.mark.parametrize("package", PACKAGES)
def test_an_id_is_kebab_case_and_of_one_rule(package):
    literal = [
        (value.value, position) for position, value in _id_expressions(package) if isinstance(value, ast.Constant)
    ]
    assert not [found for found in literal if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", found[0])]
    shared = {id for id, count in Counter(id for id, _ in literal).items() if count > 1}
    assert not sorted(found for found in literal if found[0] in shared)
