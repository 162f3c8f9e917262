"""Reads a recipe: a packaged name or a YAML file, overrides from the command line, validation, a digest.

The resolved recipe is the single source of truth of a run; everything else (Megatron's config, DeepSpeed's JSON) is derived
from it. Unknown keys, mistyped values and impossible combinations are refused with the field, the value and the remedy.
"""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ssa_megatron.config.sections import Recipe
from ssa_megatron.errors import ConfigError

RECIPES = Path(__file__).parent / "recipes"
ADDED = {"optimizer": {"kind": "adamw"}}
"""Fields of the identity added after 0.1.0, with the value that earlier runs had. `digest` leaves a field out at that value, so
that it stays what earlier checkpoints and exported folders record."""


def packaged_recipes() -> list[str]:
    """Names that `load_recipe` accepts without a path."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load_recipe(name_or_path: str, overrides: Iterable[str] = ()) -> Recipe:
    """Resolve a recipe.

    `name_or_path`: a packaged name (`demo`) or a YAML file. `overrides`: `section.field=value` strings, values in YAML syntax.
    Raises ConfigError naming the field, what it got and what would work.
    """
    values = _read_yaml(name_or_path)
    for override in overrides:
        apply_override(values, override)
    return resolve(values, origin=str(name_or_path))


def resolve(values: dict, *, origin: str) -> Recipe:
    """Validate a nested dict into a Recipe; `origin` is named in errors."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError(
            _explain(error, origin), remedy="edit the recipe or the override named above", id=_id(error.errors()[0])
        ) from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out: `config.yaml` of a run and the golden files of the tests."""
    return yaml.safe_dump(recipe.model_dump(), sort_keys=False)


def digest(recipe: Recipe) -> str:
    """sha256 (hex) of what makes two runs the same run: model, attention, optimizer, schedule, batch, seed, precision.

    Topology, ZeRO stage, recompute, intervals, paths and the attention backend may change between restarts.
    """
    values = recipe.model_dump()
    train = values["train"]
    identity = {
        "model": values["model"],
        "attention": {k: v for k, v in values["attention"].items() if k != "backend"},
        "optimizer": {k: v for k, v in values["optimizer"].items() if ADDED["optimizer"].get(k) != v},
        "schedule": values["schedule"],
        "shuffle": values["data"]["shuffle"],
        "train": {
            k: train[k]
            for k in ("steps", "sequence_length", "global_batch_rows", "micro_batch_rows", "seed", "precision")
        },
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(old: dict, new: dict, prefix: str = "") -> list[str]:
    """`section.field: old -> new`, one line a differing leaf, for the message that refuses a changed recipe."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {a!r} -> {b!r}")
    return lines


def _read_yaml(name_or_path: str) -> dict:
    path = Path(name_or_path)
    if not path.suffix and not os.path.isfile(path):  # which says no to a name too long for the file system
        path = RECIPES / f"{name_or_path}.yaml"
        if not os.path.isfile(path):
            close = difflib.get_close_matches(name_or_path, packaged_recipes(), n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise ConfigError(
                f"recipe {name_or_path!r} does not exist",
                remedy=f"{hint}packaged recipes: {', '.join(packaged_recipes())}; or give the path of a .yaml file",
                id="no-such-recipe",
            )
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigError(
            f"recipe {path} is not text: {error}", remedy="give a YAML file", id="recipe-not-text"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"recipe {path} cannot be read: {error.strerror}", remedy="check the path", id="recipe-unreadable"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"recipe {path} is not valid YAML: {error}", remedy="fix the line named above", id="recipe-not-yaml"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"recipe {path} holds {type(values).__name__}, not sections",
            remedy="start from a packaged recipe",
            id="recipe-without-sections",
        )
    return values


def apply_override(values: dict, override: str) -> None:
    """Write one `section.field=value` into nested values. Raises ConfigError when it is not of that form."""
    key, separator, text = override.partition("=")
    parts = key.split(".")
    if not separator or not all(parts):
        raise ConfigError(
            f"override {override!r} is not of the form section.field=value",
            remedy="e.g. train.steps=100",
            id="override-form",
        )
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(
            f"override {override!r}: the value is not valid YAML: {error}", remedy="quote it", id="override-not-yaml"
        ) from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string; a learning rate is a number
        value = float(value) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value
    section = values
    for part in parts[:-1]:
        section = section.setdefault(part, {})
        if not isinstance(section, dict):
            raise ConfigError(
                f"override {override!r}: {part!r} is a value, not a section",
                remedy="check the field's name",
                id="override-not-a-section",
            )
    section[parts[-1]] = value


def _id(problem: ErrorDetails) -> str:
    """Ours (`sections.py`), or pydantic's own name of the rule: `greater-than-equal`, `literal-error`."""
    known = {"extra_forbidden": "unknown-key", "missing": "required-field"}
    return known.get(problem["type"], problem["type"].replace("_", "-"))


def _explain(error: ValidationError, origin: str) -> str:
    lines = [f"recipe {origin} is not valid:"]
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            known = _fields_at(problem["loc"][:-1])
            close = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
            lines.append(f"  {where}: unknown key{hint} [{_id(problem)}]")
        elif problem["type"] == "missing":
            lines.append(f"  {where}: required, but not given [{_id(problem)}]")
        else:
            got = "" if isinstance(problem["input"], dict | BaseModel) else f" (got {problem['input']!r})"
            lines.append(f"  {where or 'recipe'}: {problem['msg'].removeprefix('Value error, ')}{got} [{_id(problem)}]")
    return "\n".join(lines)


def _fields_at(location: tuple) -> list[str]:
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        annotation = field.annotation if field else None
        choices = get_args(annotation) or (annotation,)  # an optional section is a union with None
        inner = next((c for c in choices if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if inner is None:
            return []
        model = inner
    return sorted(model.model_fields)
