"""A checkpoint of step 0: weights that came from elsewhere, from which training starts, at any topology.

It has the format of every other checkpoint, and leaves out what a run has not made yet: counters, data position (`state` is
empty) and moments, which begin at zero. It refuses a recipe whose model is another one than the weights'; everything that
does not change what the weights compute may be chosen when training starts.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ssa_megatron.checkpoint.manifest import Manifest, StoredFile, step_folder
from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.checkpoint.tensor_file import write_safetensors
from ssa_megatron.checkpoint.writer import commit, point_latest_at
from ssa_megatron.config import Recipe, digest
from ssa_megatron.config.recipe import differences
from ssa_megatron.config.variants import KINDS
from ssa_megatron.errors import CheckpointError
from ssa_megatron.model.shapes import global_shapes

FILE_BYTES = 2**30
MAY_CHANGE = ("max_sequence_length", "rope_scaling", "init_std")
"""Of the model section: a longer context is what continued pretraining often is for."""


def write_start(
    run: Path, recipe: Recipe, weights: Iterator[tuple[str, Tensor]], *, tokenizer_fingerprint: str
) -> Path:
    """Commit `weights` (global name, tensor; one at a time in memory, a file's worth while it is written) as step 0 of `run`.

    Masters are fp32. Weights that come in bf16 are kept in it too, so that an export gives them back as they were. Returns the
    step folder; what fails leaves a temporary one, which the caller removes with the run.
    """
    final = step_folder(run, 0)
    temporary = final.with_name(f".tmp-{final.name}")
    temporary.mkdir(parents=True)
    files: dict[str, StoredFile] = {}
    tensors: dict[str, dict[str, dict]] = {}
    held: dict[str, Tensor] = {}

    def flush() -> None:
        name = _file_name(len(files))
        files[name] = write_safetensors(temporary / name, held)
        held.clear()

    for name, weight in weights:
        kinds = {"master": weight.float()} | ({"weight": weight} if weight.dtype == torch.bfloat16 else {})
        if held and sum(t.nbytes for t in (*held.values(), *kinds.values())) > FILE_BYTES:
            flush()
        for kind, tensor in kinds.items():
            key, shape = f"{kind}/{name}#0", list(tensor.shape)
            held[key] = tensor.reshape(-1)
            piece = {"file": _file_name(len(files)), "key": key, "offset": [0] * len(shape), "shape": shape}
            entry = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
            tensors.setdefault(name, {})[kind] = entry | {"pieces": [piece | {"range": [0, tensor.numel()]}]}
    flush()
    manifest = Manifest(
        step=0,
        state={},
        recipe=recipe.model_dump(mode="json"),
        recipe_digest=digest(recipe),
        tokenizer_fingerprint=tokenizer_fingerprint,
        files=files,
        tensors=tensors,
    )
    commit(temporary, final, manifest)
    point_latest_at(final)
    return final


def check_start(checkpoint: Checkpoint, recipe: Recipe) -> None:
    """Raises CheckpointError, naming the fields, unless `recipe` trains the model these weights are."""
    stored, asked = (_identity(r) for r in (checkpoint.recipe, recipe.model_dump(mode="json")))
    changed = differences(stored, asked)
    shapes = {name: tuple(kinds["master"]["shape"]) for name, kinds in checkpoint.content.tensors.items()}
    if not changed and shapes == global_shapes(recipe):
        return
    lines = changed or ["its tensors are not those of its recipe"]
    raise CheckpointError(
        f"{checkpoint.folder} holds the weights of another model:\n  " + "\n  ".join(lines),
        remedy="put the values above back, or import into another run folder",
        id="checkpoint-of-another-model",
    )


def _identity(recipe: dict) -> dict:
    model = {key: value for key, value in recipe["model"].items() if key not in MAY_CHANGE}
    return {"model": model, "attention": {"gates": KINDS[recipe["attention"]["kind"]].gates}}


def _file_name(number: int) -> str:
    return f"rank-00000-{number:03d}.safetensors"
