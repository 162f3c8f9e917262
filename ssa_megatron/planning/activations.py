"""Bytes that autograd keeps of one micro-batch between forward and backward, item by item, for each recompute mode.

Counted from what the modules save (tests compare with the tensors autograd really holds): RMSNorm keeps its input and its
normalized rows in fp32, SwiGLU three tensors besides its input (megatron-core adds an offset of 0 to the linear half), the
Triton backend every stream's output and log-sum-exp and the selected blocks, the cross-entropy an fp32 softmax.
"""

from ssa_megatron.config import Recipe
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.planning.rank_shapes import RankShapes

SCORE_TILES = 4 * 2**27 * 4  # the PyTorch backend works on tiles of 2^27 fp32 scores: about four live at once on a GPU


def layer(recipe: Recipe, c: RankShapes, recompute: str) -> dict[str, int]:
    """What one layer keeps, by item; `recompute`: none, selective (attention core) or full."""
    if recompute == "full":
        return {"layer inputs": c.element * c.hidden * c.stream_tokens}
    return {
        "norms": 2 * norm(c),
        **(core_inputs(recipe, c) if recompute == "selective" else core(recipe, c)),
        "attention output": c.element * c.query * c.tokens,
        "MLP": 5 * c.element * c.ffn * c.tokens,
    }


def norm(c: RankShapes) -> int:
    """fp32 input, fp32 normalized rows, fp32 1/rms, the output (which the next linear layers share), the fp32 weight."""
    weight = 4 * c.hidden if c.element == 2 else 0
    return (8 * c.hidden + 4 + c.element * c.hidden) * c.stream_tokens + weight


def core(recipe: Recipe, c: RankShapes) -> dict[str, int]:
    """The attention core: from rotated q, k, v and gate logits to the gated output."""
    return kind_of(recipe).kept_bytes(c)


def core_inputs(recipe: Recipe, c: RankShapes) -> dict[str, int]:
    """What selective recomputation starts from: rotated q and k, the projection that v is a view of, gate logits."""
    p, m = recipe.parallel, recipe.model
    query, projection = c.query, c.query + 2 * c.key
    if p.tensor > m.num_kv_heads:  # the group's queries, and the projection gathered over all tensor-parallel ranks
        query = m.num_heads // m.num_kv_heads * m.head_dim
        projection = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    tensors = (query + c.key + projection) * c.tokens
    return {"q, k, v": c.element * tensors, "gate": c.element * c.gates * c.tokens}


def head(c: RankShapes) -> dict[str, int]:
    """What the last stage keeps beyond its layers: the final norm, and the fp32 softmax of the cross-entropy."""
    return {"final norm": norm(c), "softmax": 4 * c.vocabulary * c.tokens + 9 * c.tokens}


def batch(recipe: Recipe, c: RankShapes) -> int:
    """cos and sin of the rotary table of one micro-batch in flight."""
    return 8 * recipe.model.head_dim * c.tokens
