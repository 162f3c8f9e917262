"""A checkpoint of any topology to a Hugging Face folder that loads with torch and transformers alone.

A folder of the final name is always complete: everything is written beside it, read back and proven (parity.py), and
renamed at the end; `parity.json` holds what was compared. It refuses an existing `out`, missing,
extra or misshapen weights, and tokenizers that could not be converted exactly.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ssa_megatron.config.variants import KINDS
from ssa_megatron.errors import CheckpointError, ConfigError, DataProblem
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from ssa_megatron.hf.card import measured, model_card
from ssa_megatron.hf.parity import prove
from ssa_megatron.hf.staging import staged
from ssa_megatron.hf.tokenizer_export import write_tokenizer
from ssa_pipelines import DataError, Tokenizer

SHARD_BYTES = 5_000_000_000
BUNDLE = Path(__file__).parent / "bundle"
CODE = (
    "configuration_ssa.py",
    "modeling_ssa.py",
    "attention_ssa.py",
    "cache_ssa.py",
    "positions_ssa.py",
    "triton_ssa.py",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def export(source, out: str | Path, *, step: int | None = None, dtype: str | torch.dtype | None = None) -> Path:
    """Write the Hugging Face folder `out` and return its path.

    `source`: a run folder (its newest checkpoint, or that of `step`), a step folder, or an open Checkpoint. `dtype`:
    "bf16", "fp16", "fp32" or a torch dtype; None keeps the working precision of training. One shard of weights is in
    memory at a time while writing, one layer while comparing. Raises CheckpointError, ConfigError, DataProblem,
    EnvironmentProblem; then nothing is left behind.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise ConfigError(
            f"{out} exists already",
            remedy="name a folder that does not exist, or remove this one first",
            id="export-folder-exists",
        )
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(
                f"dtype={dtype!r} is not known", remedy=f"use one of {', '.join(DTYPES)}", id="unknown-dtype"
            )
        dtype = DTYPES[dtype]
    checkpoint = _open(source, step)
    config = config_of(checkpoint.recipe)
    expected = expected_shapes(config)
    check_names(checkpoint.names(), expected)
    with staged(out) as temporary:
        marks = _write_tokenizer(checkpoint, config, temporary)
        written = write_weights(open_weights(checkpoint, expected, dtype), temporary)
        _write_config(config, written, marks, temporary)
        parity = _check(checkpoint, SSAConfig.from_pretrained(temporary), temporary, dtype) | {
            "dtype": str(written["dtype"]).removeprefix("torch."),
            "tokenizer_texts_compared": marks["texts_compared"],
        }
        (temporary / "README.md").write_text(
            model_card(config, checkpoint.manifest, parity, out.name, measured(checkpoint)), encoding="utf-8"
        )
        parity["files"] = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        _write_json(temporary / "parity.json", parity)
    return out


# ------------------------------------------------------------------------------------------------------ the checkpoint
def _open(source, step: int | None):
    if hasattr(source, "tensor"):
        return source
    from ssa_megatron.checkpoint.reader import Checkpoint

    return Checkpoint.open(source, step=step)


def config_of(recipe: dict) -> SSAConfig:
    """The exported configuration of a resolved recipe. Raises CheckpointError for one this release does not know, and
    ConfigError for a kind that cannot be exported."""
    try:
        model, attention = recipe["model"], recipe["attention"]
        scaling, kind = model["rope_scaling"], attention["kind"]
        return SSAConfig(
            vocab_size=model["vocab_size"],
            hidden_size=model["hidden_size"],
            intermediate_size=model["ffn_size"],
            num_hidden_layers=model["num_layers"],
            num_attention_heads=model["num_heads"],
            num_key_value_heads=model["num_kv_heads"],
            head_dim=model["head_dim"],
            max_position_embeddings=model["max_sequence_length"],
            rope_theta=model["rope_theta"],
            rope_scaling=None if scaling is None else {"rope_type": "llama3", **scaling},
            rms_norm_eps=model["norm_eps"],
            initializer_range=model["init_std"],
            tie_word_embeddings=model["tied_embeddings"],
            attention_kind=kind,
            streams=KINDS[kind].exported_streams() if kind in KINDS else None,
            block_size=attention["block_size"],
            block_count=attention["block_count"],
            topk=attention["topk"],
            window=attention["window"],
            alignment_weight=attention["alignment_weight"],
            sparse_probability=attention["sparse_probability"],
        )
    except KeyError as error:
        raise CheckpointError(
            f"the checkpoint's recipe has no {error}",
            remedy="export it with the release that wrote it",
            id="recipe-field-missing",
        ) from error
    except ValueError as error:
        raise CheckpointError(
            f"the checkpoint's recipe: {error}",
            remedy="export it with the release that wrote it",
            id="recipe-not-exportable",
        ) from error


def expected_shapes(config: SSAConfig) -> dict[str, tuple[int, ...]]:
    """Global name to shape of every stored weight, in model order, as the exported class itself has them."""
    with torch.device("meta"):
        model = SSAForCausalLM(config)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def check_names(names: list[str], expected: dict[str, tuple[int, ...]]) -> None:
    missing, extra = sorted(expected.keys() - set(names)), sorted(set(names) - expected.keys())
    if missing or extra:
        what = [
            f"{word} {', '.join(found[:3])}" for word, found in (("lacks", missing), ("has unknown", extra)) if found
        ]
        raise CheckpointError(
            f"the checkpoint {' and '.join(what)}",
            remedy="its recipe and its weights do not belong together",
            id="export-names-differ",
        )


def open_weights(
    checkpoint, expected: dict[str, tuple[int, ...]], dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor]]:
    """(global name, contiguous tensor) in model order, one in memory at a time."""
    for name, shape in expected.items():
        tensor = checkpoint.tensor(name, kind="weight", dtype=dtype)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, the recipe's model needs {shape}", id="export-shape-differs"
            )
        yield name, tensor.contiguous()


# ---------------------------------------------------------------------------------------------------------- the folder
def write_weights(weights: Iterator[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> dict:
    """safetensors files of at most `shard_bytes` (one tensor may exceed it), with an index when there are several."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = parameters = 0
    dtypes: list[torch.dtype] = []

    def flush():
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, tensor in weights:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size, total, parameters = size + tensor.nbytes, total + tensor.nbytes, parameters + tensor.numel()
        dtypes.append(tensor.dtype)
    flush()
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    return {"dtype": max(dtypes, key=dtypes.count), "parameters": parameters, "bytes": total}


def _write_tokenizer(checkpoint, config: SSAConfig, folder: Path) -> dict:
    path = checkpoint.tokenizer_path
    if path is None or not Path(path).is_file():
        raise DataProblem(
            f"the run's tokenizer {path} is missing",
            remedy="copy the tokenizer model it was trained with there",
            id="tokenizer-missing",
        )
    fingerprint = checkpoint.manifest.get("tokenizer_fingerprint")
    try:
        tokenizer = Tokenizer.load(path)
    except DataError:
        if not fingerprint:
            raise
        tokenizer = None  # damaged, so not the one
    if tokenizer is None or (fingerprint and tokenizer.fingerprint != fingerprint):
        raise DataProblem(
            f"{path} is not the tokenizer the run was trained with",
            remedy=f"restore the one with fingerprint {fingerprint[:12]}...",
            id="export-another-tokenizer",
        )
    marks = write_tokenizer(tokenizer, folder, max_length=config.max_position_embeddings)
    for name, data in tokenizer.companion_files.items():  # read by `ssa import` and by SentencePiece readers
        (folder / name).write_bytes(data)
    if marks["vocab_size"] > config.vocab_size:
        raise DataProblem(
            f"the tokenizer has {marks['vocab_size']} pieces, the model {config.vocab_size} embeddings",
            id="tokenizer-too-large",
        )
    return marks


def _write_config(config: SSAConfig, written: dict, marks: dict, folder: Path) -> None:
    for name in CODE:
        shutil.copyfile(BUNDLE / name, folder / name)
    ids = {f"{key}_token_id": marks[f"{key}_id"] for key in ("bos", "eos", "pad")}
    for key, value in ids.items():
        setattr(config, key, value)
    content = config.to_dict() | {
        "architectures": ["SSAForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_ssa.SSAConfig",
            "AutoModel": "modeling_ssa.SSAModel",
            "AutoModelForCausalLM": "modeling_ssa.SSAForCausalLM",
        },
        "dtype": str(written["dtype"]).removeprefix("torch."),
    }
    _write_json(folder / "config.json", {key: content[key] for key in sorted(content)})
    _write_json(folder / "generation_config.json", {"do_sample": False, **ids})


# --------------------------------------------------------------------------------------------------------------- parity
def _check(checkpoint, config: SSAConfig, folder: Path, dtype: torch.dtype | None) -> dict:
    """Read the folder back and prove it; raises CheckpointError at the first difference."""
    for name in CODE:
        if (folder / name).read_bytes() != (BUNDLE / name).read_bytes():
            raise CheckpointError(
                f"{folder / name} was not copied whole", remedy="is the disk full? export again", id="copy-incomplete"
            )
    manifest = checkpoint.manifest
    known = {key: manifest[key] for key in ("step", "recipe_digest", "tokenizer_fingerprint")}
    return known | prove(checkpoint, folder, config, dtype)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
