"""pyproject.toml against requirements.txt and the tree: the same pins, four packages, types promised in each."""

import re
import tomllib

from tests.launch import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def pins(text: str) -> list[str]:
    return re.findall(r"^[\w.\-]+(?:\[\w+\])?==[^\s#]+", text, re.M)


def test_the_wheel_requires_what_requirements_txt_pins():
    runtime, _, development = (ROOT / "requirements.txt").read_text().partition("# --- development")
    assert PROJECT["project"]["dependencies"] == pins(runtime)
    assert PROJECT["project"]["optional-dependencies"]["dev"] == pins(development)


def test_every_pin_has_a_reason():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if pins(line) and not line.startswith("types-") and "# " not in line] == []


def test_each_package_has_a_name_of_its_own_and_promises_types():
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [path.rpartition("/")[2] for path in packages] == PROJECT["tool"]["mypy"]["packages"]
    assert [path for path in packages if not (ROOT / path / "py.typed").is_file()] == []
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow Hugging Face's kernels from a checkout"
