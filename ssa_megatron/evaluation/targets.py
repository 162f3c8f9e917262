"""What `ssa evaluate` is pointed at: run folders, step folders, exported folders, and results of earlier evaluations.

A run is exported to a temporary folder first, so that what is measured is what others would load. It refuses anything
else, and results of another schema.
"""

import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ssa_megatron.config import Recipe
from ssa_megatron.errors import CheckpointError, ConfigError
from ssa_megatron.evaluation.evaluation_page import compose
from ssa_megatron.hf.generate import open_folder

SCHEMA = "ssa-evaluation/1"


@dataclass(frozen=True)
class Opened:
    """A model ready to run, and what says which one it is."""

    model: torch.nn.Module
    tokenizer: object
    identity: dict
    folder: Path
    """The exported folder; gone when the target is closed, if the target was a run."""

    @property
    def trained_length(self) -> int:
        """Tokens of the longest sequence in training."""
        return self.model.config.max_position_embeddings


def kind_of(target: Path) -> str:
    """What a target is: run, folder or results. Raises CheckpointError for anything else."""
    if target.is_file() and target.suffix == ".json":
        return "results"
    if (target / "config.json").is_file():
        return "folder"
    if (target / "checkpoints").is_dir() or (target / "manifest.json").is_file():
        return "run"
    raise CheckpointError(
        f"{target}: neither a run folder, nor an exported folder, nor results of an evaluation",
        remedy="name a folder that `ssa train` or `ssa export` made, or a results.json of `ssa evaluate`",
        id="unknown-target",
    )


def recipe_of(target: Path) -> Recipe | None:
    """The recipe of a run folder, where its data is named; None for every other target."""
    if not (target / "config.yaml").is_file():
        return None
    from ssa_megatron.train.run_folder import read_recipe

    return read_recipe(target)


def earlier(path: Path) -> list[dict]:
    """The models of a results file. Raises CheckpointError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        schema, models = found["schema"], found["models"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not results of an evaluation ({error!r})", remedy="evaluate again", id="not-results"
        ) from None
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path}: schema {schema}, this release reads {SCHEMA}", remedy="evaluate again", id="results-schema"
        )
    try:
        if models:
            compose(models)  # now, and not after minutes of measuring the models that stand beside them
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: damaged results of an evaluation ({error!r})",
            remedy="evaluate again",
            id="results-damaged",
        ) from None
    return models


@contextmanager
def opened(target: Path, name: str, *, step: int | None, device: str, dtype: str | None) -> Iterator[Opened]:
    """The model of a run folder, step folder or exported folder. Raises CheckpointError, ConfigError, DataProblem."""
    with tempfile.TemporaryDirectory(prefix="ssa-evaluate-") as scratch:
        folder = target
        if kind_of(target) == "run":
            from ssa_megatron.hf.export import export

            folder = export(target, Path(scratch) / "model", step=step)
        elif step is not None:
            raise ConfigError(
                f"--step {step}: {target} is an exported folder, of one step",
                remedy="leave --step out",
                id="step-of-an-export",
            )
        model, tokenizer = open_folder(folder, device=device)
        if dtype:
            model = model.to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
        yield Opened(model, tokenizer, _identity(name, target, folder, model), folder)


def names(targets: Sequence[Path]) -> list[str]:
    """A short name for each: the last parts of its path, as many as it takes to tell all of them apart."""
    paths = [target.resolve() for target in targets]
    for count in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        short = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(short)) == len(short):
            return short
    if paths:
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConfigError(f"{twice} is named twice", remedy="name each target once", id="target-twice")
    return []


def unlike(name: str, taken: Sequence[str]) -> str:
    """`name`, or `name (2)` and so on where an earlier evaluation has a model of that name."""
    others = (f"{name} ({number})" for number in itertools.count(2))
    return name if name not in taken else next(other for other in others if other not in taken)


def not_finite(opened: "Opened", mode: str) -> CheckpointError:
    """The error of scores that are no numbers."""
    return CheckpointError(
        f"{opened.identity['name']}: likelihoods in {mode} mode are not finite ({opened.identity['dtype']})",
        remedy="evaluate another --step, or with --dtype fp32",
        id="likelihoods-not-finite",
    )


def _identity(name: str, target: Path, folder: Path, model) -> dict:
    try:
        parity = dict(json.loads((folder / "parity.json").read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'parity.json'}: damaged ({error})", remedy="export the run again", id="parity-damaged"
        ) from None
    config = model.config
    return {
        "name": name,
        "target": str(target),
        "kind": config.attention_kind,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "block_size": config.block_size,
        "block_count": config.block_count,
        "trained_length": config.max_position_embeddings,
        "parameters": parity.get("parameters"),
        "step": parity.get("step"),
        "weights_sha256": parity.get("weights_sha256"),
        "recipe_digest": parity.get("recipe_digest"),
        "tokenizer_fingerprint": parity.get("tokenizer_fingerprint"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
    }
