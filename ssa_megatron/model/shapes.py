"""The shape of every weight under its global name: what a model is before a topology divides it.

The names are listed in docs/checkpoint-format.md, "Global names". This module needs only the recipe, so planning,
reports and exports can ask without importing megatron-core.
"""

import math

from ssa_megatron.config import Recipe
from ssa_megatron.model.kinds import kind_of


def global_shapes(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Every global name of the recipe's model with its shape, in model order."""
    m = recipe.model
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (m.vocab_size, m.hidden_size)}
    for i in range(m.num_layers):
        layer = f"model.layers.{i}."
        shapes[layer + "input_layernorm.weight"] = (m.hidden_size,)
        shapes[layer + "self_attn.q_proj.weight"] = (m.num_heads * m.head_dim, m.hidden_size)
        shapes[layer + "self_attn.k_proj.weight"] = (m.num_kv_heads * m.head_dim, m.hidden_size)
        shapes[layer + "self_attn.v_proj.weight"] = (m.num_kv_heads * m.head_dim, m.hidden_size)
        shapes[layer + "self_attn.g_proj.weight"] = (m.num_heads * kind_of(recipe).gates, m.hidden_size)
        shapes[layer + "self_attn.o_proj.weight"] = (m.hidden_size, m.num_heads * m.head_dim)
        shapes[layer + "post_attention_layernorm.weight"] = (m.hidden_size,)
        shapes[layer + "mlp.gate_proj.weight"] = (m.ffn_size, m.hidden_size)
        shapes[layer + "mlp.up_proj.weight"] = (m.ffn_size, m.hidden_size)
        shapes[layer + "mlp.down_proj.weight"] = (m.hidden_size, m.ffn_size)
    shapes["model.norm.weight"] = (m.hidden_size,)
    if not m.tied_embeddings:
        shapes["lm_head.weight"] = (m.vocab_size, m.hidden_size)
    return shapes


def parameter_count(recipe: Recipe) -> int:
    """Elements of all weights; a tied output layer counts once."""
    return sum(math.prod(shape) for shape in global_shapes(recipe).values())


def padded_vocab_size(recipe: Recipe) -> int:
    """Rows the tensor-parallel ranks share evenly; the padding never leaves the process."""
    size = recipe.parallel.tensor
    return -(-recipe.model.vocab_size // size) * size
