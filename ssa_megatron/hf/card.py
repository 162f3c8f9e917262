"""The model card of an exported folder: what it is, what it was trained with, how to run both modes.

Every figure comes from the configuration, the checkpoint's manifest or the parity check; nothing is claimed that was
not measured.
"""

from ssa_megatron.hf.configuration_ssa import SSAConfig

KINDS = {
    "ssa": "trained on full and sparse attention with the alignment loss between the two",
    "full": "trained on gated full attention",
    "moba": "trained on gated block-sparse attention alone",
    "nsa": "trained on compressed, selected and window streams, each with its own gate",
}


def model_card(config: SSAConfig, manifest: dict, parity: dict, name: str) -> str:
    """Markdown with the Hub's metadata block."""
    c = config
    heads = f"{c.num_attention_heads} query heads in {c.num_key_value_heads} groups of {c.head_dim} channels"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [ssa, sparse-attention, pretrained]
---
# {name}

A {parity["parameters"] / 1e6:,.1f} M parameter base language model with Sparse Sparse Attention (arXiv 2511.20102),
exported by SSA-Megatron: {KINDS[c.attention_kind]}. It continues text; it was not tuned to follow instructions.

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

`parity.json` records the check made at export: every weight reloaded and compared bit for bit with the checkpoint.

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
