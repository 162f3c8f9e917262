"""A Hugging Face folder to a run folder that training starts from: weights as step 0, tokenizer, and a recipe to edit.

    RUN/recipe.yaml                     model and attention as the folder has them, the rest a place to start from
    RUN/tokenizer.model or .json        what the data must be prepared with
    RUN/checkpoints/step-00000000/      checkpoint/initial.py

The run folder is made beside its final name and renamed at the end: an import that fails leaves nothing. It refuses an
existing run folder, a tokenizer larger than the vocabulary, and everything that folder.py and origins.py refuse.
"""

from collections.abc import Iterable
from pathlib import Path

import ssa_pipelines
from ssa_megatron.checkpoint.initial import write_start
from ssa_megatron.config import Recipe, dump_recipe, resolve
from ssa_megatron.config.recipe import apply_override, differences
from ssa_megatron.errors import ConfigError, DataProblem
from ssa_megatron.files import write_durably
from ssa_megatron.hf.folder import HubFolder
from ssa_megatron.hf.origins import Origin, check_kind, origin_of, weights_of
from ssa_megatron.hf.staging import staged

LONGEST_ROW = 8192


def import_folder(
    source: str | Path, run: str | Path, overrides: Iterable[str] = (), *, tokenizer: str | Path | None = None
) -> Recipe:
    """Make the run folder `run` from the Hugging Face folder `source`; returns the recipe written into it.

    overrides: `section.field=value`; attention may differ from the folder's, the model may not. tokenizer: where the folder
    has none that can be used. One tensor is in memory at a time, and one file's worth while it is written. Raises
    ConfigError, DataProblem, ssa_pipelines.DataError, CheckpointError, EnvironmentProblem; then nothing is left behind.
    """
    run = Path(run)
    if run.exists() or run.is_symlink():
        raise ConfigError(
            f"{run} exists already",
            remedy="name a run folder that does not exist, or remove this one",
            id="import-folder-exists",
        )
    folder = HubFolder(source)
    origin = origin_of(folder)
    recipe = _recipe(folder, origin, run.name, overrides)
    weights = weights_of(folder, origin, recipe)
    own = _tokenizer(folder, tokenizer)
    if own.vocab_size > recipe.model.vocab_size:
        raise DataProblem(
            f"{own.path}: {own.vocab_size} tokens, the model has {recipe.model.vocab_size} embeddings",
            remedy="give the tokenizer the model was trained with: --tokenizer FILE",
            id="tokenizer-size-differs",
        )
    with staged(run) as temporary:
        for name, content in own.files.items():
            (temporary / name).write_bytes(content)
        write_durably(temporary / "recipe.yaml", dump_recipe(recipe))
        write_start(temporary, recipe, weights, tokenizer_fingerprint=own.fingerprint)
    return recipe


def _recipe(folder: HubFolder, origin: Origin, name: str, overrides: Iterable[str]) -> Recipe:
    half = set(folder.dtypes.values()) & {"bfloat16", "float16"}
    values = {
        "name": name,
        "model": dict(origin.model),
        "attention": dict(origin.attention),
        "optimizer": {"lr": 1e-4},
        "train": {
            "steps": 1000,
            "sequence_length": min(LONGEST_ROW, origin.model["max_sequence_length"]),
            "global_batch_rows": 64,
            "micro_batch_rows": 1,
            "precision": "bf16" if half else "fp32",
            "recompute": "selective",
        },
    }
    for override in overrides:
        apply_override(values, override)
    values["attention"]["kind"] = check_kind(folder, origin, values["attention"].get("kind"))
    recipe = resolve(values, origin=str(folder.path / "config.json"))
    own = resolve({**values, "model": origin.model, "train": _any_train(origin)}, origin=str(folder.path))
    changed = differences(own.model.model_dump(), recipe.model.model_dump(), "model.")
    if changed:
        raise ConfigError(
            f"{folder.path}: the model cannot be changed on the way in: {changed[0]}",
            remedy="`ssa train` takes max_sequence_length, rope_scaling and init_std when it starts",
            id="import-changes-model",
        )
    return recipe


def _any_train(origin: Origin) -> dict:
    length = min(LONGEST_ROW, origin.model["max_sequence_length"])
    return {"steps": 1, "sequence_length": length, "global_batch_rows": 1, "micro_batch_rows": 1}


def _tokenizer(folder: HubFolder, given: str | Path | None) -> ssa_pipelines.Tokenizer:
    """The given one, or the folder's. Of several, tokenizer.json, unless the folder is an export and keeps its source."""
    if given is not None:
        return ssa_pipelines.Tokenizer.load(given)
    names = ssa_pipelines.Tokenizer.file_names()
    found = [folder.path / name for name in names if (folder.path / name).is_file()]
    if not found:
        problem = f"{folder.path}: no {' and no '.join(reversed(names))}"
        raise DataProblem(problem, remedy="--tokenizer FILE", id="import-without-tokenizer")
    return ssa_pipelines.Tokenizer.load(found[0] if folder.config["model_type"] == "ssa" else found[-1])
