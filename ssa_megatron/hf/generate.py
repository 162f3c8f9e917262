"""Text from an exported folder, through transformers' own `generate`, in full or sparse mode with a KV cache.

A prompt gives the same greedy text alone as in a batch: rows are padded on the left and blocks are counted from each
row's first real token. It refuses a folder that is not a complete export, and sampling settings that mean nothing.
"""

from collections.abc import Sequence
from pathlib import Path

from ssa_megatron.errors import CheckpointError, ConfigError, SSAError

MODES = ("full", "sparse")


def open_folder(folder: str | Path, *, device: str = "cpu"):
    """(model, tokenizer) of an exported folder. Raises CheckpointError if it is missing, incomplete or damaged."""
    from ssa_megatron.hf import bare  # here: importing transformers takes seconds, and errors above need none of it

    path = Path(folder)
    for name in ("config.json", "tokenizer.json", "parity.json"):
        if not (path / name).is_file():
            raise CheckpointError(
                f"{folder}: not an exported model, {name} is missing",
                remedy="make one with `ssa export RUN OUT`",
                id="not-an-export",
            )
    try:
        return bare.load_model(path, device=device), bare.load_tokenizer(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{folder}: cannot be loaded: {_what(error, path)}",
            remedy="export the run again",
            id="export-not-loaded",
        ) from error
    except Exception as error:  # safetensors' own error type derives from Exception directly
        if type(error).__name__ != "SafetensorError":
            raise
        raise CheckpointError(
            f"{folder}: damaged weights ({error})", remedy="export the run again", id="export-damaged"
        ) from error


def _what(error: Exception, path: Path) -> str:
    """One line of it. For weights of other shapes than config.json's the headers are read: transformers 5 names none."""
    from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
    from ssa_megatron.hf.export import expected_shapes
    from ssa_megatron.hf.folder import HubFolder

    try:
        stored, expected = HubFolder(path).shapes, expected_shapes(SSAConfig.from_pretrained(path))
    except (SSAError, OSError, ValueError, RuntimeError):
        stored = expected = {}  # then the first error is the one to tell
    for name, shape in expected.items():
        if stored.get(name, shape) != shape:
            return f"{name} has shape {stored[name]}, config.json's sizes make it {shape}"
    return str(error).splitlines()[0]


def check_attention(mode: str | None, block_count: int | None) -> None:
    """Raises ConfigError unless mode is None, full or sparse, and block_count None or at least 1."""
    if mode is not None and mode not in MODES:
        raise ConfigError(
            f"mode={mode!r} is not an inference mode", remedy=f"use one of {', '.join(MODES)}", id="unknown-mode"
        )
    if block_count is not None and block_count < 1:
        raise ConfigError(
            f"block_count={block_count} must be at least 1", remedy="the own block is always selected", id="block-count"
        )


def generate(
    folder: str | Path,
    prompts: Sequence[str],
    *,
    mode: str | None = None,
    block_count: int | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    device: str = "cpu",
) -> list[str]:
    """The continuation of each prompt, without the prompt.

    `mode`: "full", "sparse", or None for the folder's own default; `block_count`: blocks per token in sparse mode.
    `temperature` 0 is greedy; above it, nucleus sampling with `top_p`, repeatable by `seed`. Raises ConfigError,
    CheckpointError.
    """
    from ssa_megatron.hf import bare

    check_attention(mode, block_count)
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(
            "prompts must be a list with at least one text", remedy="put a single prompt in a list", id="no-prompts"
        )
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1", id="max-new-tokens")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"temperature={temperature}, top_p={top_p}", remedy="temperature >= 0 and 0 < top_p <= 1", id="sampling"
        )
    model, tokenizer = open_folder(folder, device=device)
    return bare.generate_texts(
        model,
        tokenizer,
        prompts,
        mode=mode,
        block_count=block_count,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
