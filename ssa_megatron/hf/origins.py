"""What a Hugging Face folder is, in this project's words: recipe sections from its config.json, and where each weight is.

Three origins: `ssa` (our export, taken as it is), `llama` (the start of continued pretraining: gates that are exactly one half
and an output projection that is exactly doubled) and `llama-nsa` (the authors' SSA, FullAttn, MoBA and NSA models: three gates
a head, of which all kinds but nsa use the second). It refuses whatever the trainer would compute differently from the folder.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.config.sections import Attention
from ssa_megatron.config.variants import KINDS
from ssa_megatron.errors import CheckpointError, ConfigError
from ssa_megatron.hf.folder import HubFolder
from ssa_megatron.model.shapes import global_shapes

GATE, OUTPUT = ".self_attn.g_proj.weight", ".self_attn.o_proj.weight"
THEIR_STREAMS = ("compressed", "sparse", "window")
"""Streams of the authors' NSA, in the order of its gates. Their other kinds have three gates too and multiply by the second."""
SELECTED = 1
SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Origin(NamedTuple):
    """`model`, `attention`: sections of a recipe. `kinds`: what attention.kind may be, the first unless said otherwise."""

    model: dict
    attention: dict
    kinds: tuple[str, ...]
    weight: Callable[[HubFolder, str, tuple[int, ...], str], Tensor]
    """(folder, global name, its shape, attention.kind) -> the tensor."""
    extra: Callable[[str], bool] = lambda name: False
    """Stored tensors that may be there and are not used."""


def origin_of(folder: HubFolder) -> Origin:
    """Raises CheckpointError naming the entry of config.json that cannot be imported."""
    kind = folder.config.get("model_type")
    if kind not in READERS:
        raise CheckpointError(
            f"{folder.path}: model_type {kind!r} cannot be imported",
            remedy=f"known: {', '.join(READERS)}",
            id="unknown-model-type",
        )
    return READERS[kind](folder)


def weights_of(folder: HubFolder, origin: Origin, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    """(global name, tensor) in model order, one in memory at a time. Raises CheckpointError for what is missing or misshapen.

    Everything is compared with the files' headers before the first tensor is read.
    """
    kind, shapes = recipe.attention.kind, global_shapes(recipe)
    unknown = [name for name in folder.shapes if name not in shapes and not origin.extra(name)]
    tied_head = "lm_head.weight" in unknown and recipe.model.tied_embeddings
    if tied_head:
        unknown.remove("lm_head.weight")
    if unknown:
        raise CheckpointError(
            f"{folder.path}: {unknown[0]} (and {len(unknown) - 1} more) has no place in this model",
            remedy="biases, adapters and other architectures cannot be imported",
            id="tensor-without-counterpart",
        )
    with torch.device("meta"):
        for name, shape in shapes.items():
            origin.weight(_Headers(folder), name, shape, kind)
    if tied_head and not torch.equal(folder.tensor("lm_head.weight"), folder.tensor("model.embed_tokens.weight")):
        raise CheckpointError(
            f"{folder.path}: tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight",
            remedy="set tie_word_embeddings to false in config.json if the head is a weight of its own",
            id="tied-head-differs",
        )
    return ((name, origin.weight(folder, name, shape, kind)) for name, shape in shapes.items())


class _Headers:
    """A folder whose tensors have shapes and no values."""

    def __init__(self, folder: HubFolder):
        self.path, self.shapes, self.dtypes = folder.path, folder.shapes, folder.dtypes

    def tensor(self, name: str) -> Tensor:
        return torch.empty(self.shapes[name], dtype=getattr(torch, self.dtypes[name]), device="meta")


# ----------------------------------------------------------------------------------------------------------- weights
def _stored(folder: HubFolder, name: str, shape: tuple[int, ...], kind: str = "") -> Tensor:
    if name not in folder.shapes:
        raise CheckpointError(
            f"{folder.path}: {name} is missing",
            remedy="copy the folder again, all shards of it",
            id="source-tensor-missing",
        )
    if folder.shapes[name] != shape:
        raise CheckpointError(
            f"{folder.path}: {name} has shape {folder.shapes[name]}, config.json's sizes make it {shape}",
            remedy="config.json and the weights do not belong together",
            id="source-shape-differs",
        )
    return folder.tensor(name)


def _llama_weight(folder: HubFolder, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    """Gate weights of zero make every gate sigmoid(0) = 1/2 exactly, whatever comes in; the doubled projection undoes that.

    Both are powers of two, so nothing is rounded: the first forward is the original's. The gates learn at once: their
    gradient is the attention's output, not the gate's weight. Values stay as they are, hence so do routing, caches and
    sparsity figures.
    """
    if name.endswith(GATE):
        return torch.zeros(shape, dtype=getattr(torch, folder.dtypes["model.embed_tokens.weight"]))
    found = _stored(folder, name, shape)
    if name.endswith(OUTPUT):
        return 2 * (found.float() if found.dtype == torch.float16 else found)  # fp16 could overflow
    return found


def _authors_weight(folder: HubFolder, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    if not name.endswith(GATE) or KINDS[kind].streams == THEIR_STREAMS:
        return _stored(folder, name, shape)
    return _stored(folder, name, (len(THEIR_STREAMS) * shape[0], shape[1]))[SELECTED::3].contiguous()


# ------------------------------------------------------------------------------------------------------------ config
def _ours(folder: HubFolder) -> Origin:
    c = folder.config
    kind = _entry(folder, "attention_kind")
    if kind not in KINDS:
        raise CheckpointError(
            f"{folder.path}: attention_kind {kind!r} is unknown",
            remedy=f"known: {', '.join(KINDS.names())}",
            id="unknown-attention-kind",
        )
    streams = KINDS[kind].exported_streams()
    if tuple(c.get("streams") or streams) != streams:
        raise CheckpointError(
            f"{folder.path}: attention_kind {kind!r} has the streams {', '.join(c['streams'])}, here {', '.join(streams)}",
            remedy="import it with the code that trained it",
            id="other-streams",
        )
    names = ("block_size", "block_count", "topk", "window", "alignment_weight", "sparse_probability")
    attention = {name: c[name] for name in names if name in c}
    alike = (k for k in KINDS.names() if KINDS[k].gates == KINDS[kind].gates and k != kind)
    return Origin(_model(folder, eps=1e-5, theta=500000.0, tied=True), attention, (kind, *alike), _stored)


def _llama(folder: HubFolder) -> Origin:
    _refuse_unlike_llama(folder)
    return Origin(_model(folder, eps=1e-6, theta=10000.0, tied=False), {}, _plain_kinds(), _llama_weight, _is_buffer)


def _plain_kinds() -> tuple[str, ...]:
    """Kinds with one gate over full or sparse attention, which a Llama also computes; the recipe's default first."""
    default = Attention.model_fields["kind"].default
    plain = (k for k in KINDS.names() if KINDS[k].gates == 1 and {"full", "sparse"}.issuperset(KINDS[k].streams))
    return tuple(sorted(plain, key=lambda kind: kind != default))


def _authors(folder: HubFolder) -> Origin:
    """Their config does not say which of the four models it is, except that NSA's alone has a window."""
    _refuse_unlike_llama(folder)
    size, count, window = (_entry(folder, name) for name in ("block_size", "block_counts", "window_size"))
    attention = {"block_size": size, "block_count": count}
    attention |= {"topk": "reference"} if (size, count) == (16, 16) else {}
    attention |= {"window": window} if window else {}
    theirs = tuple(k for k in KINDS.names() if KINDS[k].streams == THEIR_STREAMS)
    kinds = theirs if window else ("", *_plain_kinds())
    return Origin(_model(folder, eps=1e-6, theta=10000.0, tied=False), attention, kinds, _authors_weight, _is_buffer)


READERS = {"ssa": _ours, "llama": _llama, "llama-nsa": _authors}


def _is_buffer(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")  # old versions of transformers saved it


def _entry(folder: HubFolder, name: str):
    if folder.config.get(name) is None:
        raise CheckpointError(
            f"{folder.path}: config.json has no {name}", remedy="copy config.json again", id="config-json-field-missing"
        )
    return folder.config[name]


def _count(folder: HubFolder, name: str) -> int:
    value = _entry(folder, name)
    if not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{folder.path}: config.json has {name}={value!r}", remedy="copy config.json again", id="config-json-value"
        )
    return value


def _model(folder: HubFolder, *, eps: float, theta: float, tied: bool) -> dict:
    """The recipe's model section. eps, theta, tied: what the architecture's class takes where config.json is silent."""
    c, heads = folder.config, _count(folder, "num_attention_heads")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(
            f"{folder.path}: rope_scaling={rope!r} is not an object",
            remedy="copy config.json again",
            id="rope-scaling-not-an-object",
        )
    return {
        "vocab_size": _count(folder, "vocab_size"),
        "hidden_size": _count(folder, "hidden_size"),
        "num_layers": _count(folder, "num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": c.get("num_key_value_heads") or heads,
        "head_dim": c.get("head_dim") or _count(folder, "hidden_size") // heads,
        "ffn_size": _count(folder, "intermediate_size"),
        "max_sequence_length": _count(folder, "max_position_embeddings"),
        "rope_theta": rope.get("rope_theta") or c.get("rope_theta") or theta,
        "rope_scaling": _scaling(folder, rope),
        "norm_eps": c.get("rms_norm_eps", eps),
        "tied_embeddings": bool(c.get("tie_word_embeddings", tied)),
        "init_std": c.get("initializer_range", 0.02),
    }


def _scaling(folder: HubFolder, rope: dict) -> dict | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise CheckpointError(
            f"{folder.path}: rope_type {kind!r} is not one the trainer computes",
            remedy="known: default, llama3; for another, import the model as it was before its context was extended",
            id="unknown-rope-type",
        )
    missing = [name for name in SCALING if name not in rope]
    if missing:
        raise CheckpointError(
            f"{folder.path}: rope_scaling has no {missing[0]}",
            remedy="copy config.json again",
            id="rope-scaling-field-missing",
        )
    return {name: rope[name] for name in SCALING}


def _refuse_unlike_llama(folder: HubFolder) -> None:
    c = folder.config
    wrong = [name for name in ("attention_bias", "mlp_bias", "quantization_config") if c.get(name)]
    wrong += ["hidden_act"] if c.get("hidden_act", "silu") != "silu" else []
    wrong += ["partial_rotary_factor"] if c.get("partial_rotary_factor", 1.0) != 1.0 else []
    if wrong:
        raise CheckpointError(
            f"{folder.path}: {wrong[0]}={c[wrong[0]]!r} cannot be imported",
            remedy="models without biases, with SiLU, unquantised and rotated over the whole head can",
            id="unsupported-model-option",
        )


def check_kind(folder: HubFolder, origin: Origin, kind: str | None) -> str:
    """The attention kind to import as. Raises ConfigError where it must be said, or cannot be that."""
    if kind is None and origin.kinds[0]:
        return origin.kinds[0]
    known = [k for k in origin.kinds if k]
    if kind not in known:
        said = f"attention.kind={kind}" if kind else "attention.kind is not given, and config.json does not tell it"
        raise ConfigError(
            f"{folder.path}: {said}",
            remedy=f"attention.kind={'|'.join(known)}, as it was trained",
            id="attention-kind-undecided",
        )
    return kind
