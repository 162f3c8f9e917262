"""The model card of an exported folder: what it is, what it was trained with, how to run both modes.

Every figure comes from the configuration, the checkpoint's manifest or the parity check; nothing is claimed that was
not measured.
"""

import math

from ssa_megatron.config.variants import KINDS
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.train.metrics import read_metrics

LOSSES = {"eval/loss_full": "full", "eval/loss_sparse": "sparse", "eval/loss": "own"}


def measured(checkpoint) -> dict | None:
    """The trainer's own evaluation nearest before the exported step: {"step", mode: nats per token}; None if there is none."""
    metrics, step = checkpoint.folder.parent.parent / "metrics.jsonl", checkpoint.manifest["step"]
    if not metrics.is_file():
        return None
    for line in reversed(read_metrics(metrics, skip_damaged=True)):
        found = {mode: line[key] for key, mode in LOSSES.items() if line.get(key) is not None}
        if line["step"] <= step and found:
            return {"step": line["step"], **found}
    return None


def _perplexity(found: dict | None, own_mode: str) -> str:
    if found is None:
        return "not measured in training; `ssa evaluate` measures it"
    modes = {own_mode if mode == "own" else mode: nats for mode, nats in found.items() if mode != "step"}
    said = ", ".join(f"{math.exp(nats):.3f} {mode}" for mode, nats in modes.items())
    return f"{said} (validation rows, at step {found['step']})"


def _data(manifest: dict) -> str:
    """Fingerprints of the datasets, as the checkpoint's data position names them."""
    datasets = manifest["state"].get("data", {}).get("datasets", {})
    named = (f"{name} `{fingerprint}`" if name else f"`{fingerprint}`" for name, fingerprint in datasets.items())
    return ", ".join(named) or "none: the weights were imported"


def model_card(config: SSAConfig, manifest: dict, parity: dict, name: str, evaluated: dict | None = None) -> str:
    """Markdown with the Hub's metadata block. evaluated: see `measured`."""
    c, kind = config, KINDS[config.attention_kind]
    heads = f"{c.num_attention_heads} query heads in {c.num_key_value_heads} groups of {c.head_dim} channels"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [ssa, sparse-attention, pretrained]
---
# {name}

A {parity["parameters"] / 1e6:,.1f} M parameter base language model with Sparse Sparse Attention (arXiv 2511.20102),
exported by SSA-Megatron: {kind.training}. It continues text; it was not tuned to follow instructions.

| | |
|---|---|
| layers, hidden, MLP | {c.num_hidden_layers}, {c.hidden_size}, {c.intermediate_size} |
| attention | `{c.attention_kind}`, {heads} |
| blocks | {c.block_count} of {c.block_size} tokens (top-k: {c.topk}) |
| context, vocabulary | {c.max_position_embeddings} tokens, {c.vocab_size} |
| dtype | {parity["dtype"]} |
| optimizer steps | {manifest["step"]} |
| recipe digest | `{manifest["recipe_digest"]}` |
| tokenizer fingerprint | `{manifest["tokenizer_fingerprint"]}` |
| data fingerprints | {_data(manifest)} |
| perplexity | {_perplexity(evaluated, kind.inference_mode)} |
| weights | sha256 `{parity["weights_sha256"]}` |

`parity.json` records the proof made at export: every weight read back and compared bit for bit with the checkpoint, and each
layer against the trainer's on {parity["forward"]["tokens"]} tokens in both modes, fp64: at most
{max(parity["forward"]["trainer_minus_export"].values()):.1e} of its size apart.

## Use
Needs torch and transformers (4.57 or 5.x) only.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=False)
model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
inputs = tokenizer(["In the beginning"], return_tensors="pt")
for mode in ("full", "sparse"):
    model.set_attention(inference_mode=mode)  # or pass inference_mode=..., block_count=... to generate() and forward()
    output = model.generate(**inputs, max_new_tokens=64)
    print(mode, tokenizer.decode(output[0], skip_special_tokens=True))
```

`full` attends to every earlier token; `sparse` to {c.block_count} blocks of {c.block_size} tokens per token and
key/value head, the token's own block included. Without a choice the model runs in `{c.inference_mode}` mode.
"""
