"""Tiny models of the exported class with the oracle's weights, their tokens, and the ways to feed them."""

import torch

from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from tests.oracle import model as oracle

KINDS = ("full", "moba", "nsa", "ssa")
MODES = ("full", "sparse")


def build(kind, *, tied=True, dtype=torch.float64, std=0.3, heads=(6, 2), **attention):
    """(model, oracle configuration, oracle weights) with equal weights."""
    attention = {"block_size": 16, "block_count": 4, "window": 40} | attention
    reference = oracle.OracleConfig(97, 48, 2, *heads, 8, 80, kind=kind, tied=tied, **attention)
    weights = oracle.random_weights(reference, seed=1, std=std)
    config = SSAConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=8,
        attention_kind=kind,
        tie_word_embeddings=tied,
        **attention,
    )
    model = SSAForCausalLM(config).to(dtype).eval()
    full = dict(weights) if not tied else {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict(full)
    return model, reference, weights


def tokens_of(length, rows=1):
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(length))


def feed(model, tokens, steps, mode, mask=None):
    """Logits of the tokens fed in `steps` pieces through one cache."""
    cache, outputs, at = None, [], 0
    for step in steps:
        seen = None if mask is None else mask[:, : at + step]
        piece = tokens[:, at : at + step]
        output = model(piece, attention_mask=seen, past_key_values=cache, use_cache=True, inference_mode=mode)
        cache, at = output.past_key_values, at + step
        outputs.append(output.logits)
    return torch.cat(outputs, 1), cache


def left_padded(rows):
    width = max(len(row) for row in rows)
    tokens, mask = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(2))
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return tokens, mask
