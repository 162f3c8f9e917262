"""Bytes that autograd keeps of one micro-batch between forward and backward, item by item, for each recompute mode.

Counted from what the modules save (tests compare with the tensors autograd really holds): RMSNorm keeps its input and its
normalized rows in fp32, SwiGLU three tensors besides its input (megatron-core adds an offset of 0 to the linear half), the
Triton backend every stream's output and log-sum-exp and the selected blocks, the cross-entropy an fp32 softmax.
"""

from ssa_megatron.config import Recipe
from ssa_megatron.planning.rank_shapes import Cut

LSE_PAD = 128  # kernels/ssa_kernels/triton/dense.py
SCORE_TILES = 4 * 2**27 * 4  # the PyTorch backend works on tiles of 2^27 fp32 scores: about four live at once on a GPU


def layer(recipe: Recipe, c: Cut, recompute: str) -> dict[str, int]:
    """What one layer keeps, by item; `recompute`: none, selective (attention core) or full."""
    if recompute == "full":
        return {"layer inputs": c.element * c.hidden * c.stream_tokens}
    return {
        "norms": 2 * norm(c),
        **(core_inputs(recipe, c) if recompute == "selective" else core(recipe, c)),
        "attention output": c.element * c.query * c.tokens,
        "MLP": 5 * c.element * c.ffn * c.tokens,
    }


def norm(c: Cut) -> int:
    """fp32 input, fp32 normalized rows, fp32 1/rms, the output (which the next linear layers share), the fp32 weight."""
    weight = 4 * c.hidden if c.element == 2 else 0
    return (8 * c.hidden + 4 + c.element * c.hidden) * c.stream_tokens + weight


def core(recipe: Recipe, c: Cut) -> dict[str, int]:
    """The attention core: from rotated q, k, v and gate logits to the gated output."""
    kind, torch_backend = recipe.attention.kind, recipe.attention.backend == "torch"
    # v is a view of the whole projection, and only a copy of v lets go of it
    mixed = c.element * (c.query + 2 * c.key) * c.tokens
    q, k = c.element * c.query * c.tokens, c.element * c.key * c.key_tokens
    row = c.tokens // c.rows
    lse = 4 * c.heads * c.rows  # times tokens of a row, which the dense kernel pads
    dense, sparse = q + lse * (-(-row // LSE_PAD) * LSE_PAD if not torch_backend else row), q + lse * row
    blocks = 4 * c.kv_heads * recipe.attention.block_count * c.tokens
    gate = 4 * c.gates * c.tokens
    items = {"q, k, v": q + 2 * k if not torch_backend else q + k + mixed, "gate": gate}
    if kind == "nsa":  # pooling keeps k, v's projection and two gather indices; streams copy what is not contiguous
        copies = 0 if torch_backend else 2
        items["q, k, v"] = q * (3 if copies and c.rows > 1 else 1) + k * (1 + (copies if c.rows > 1 else 0)) + mixed
        items["q, k, v"] += copies * k + 16 * c.key_tokens + 2 * (k + c.key_tokens) // recipe.attention.block_size
        items["compressed, window"] = 2 * dense
    if kind in ("full", "ssa"):
        items["full stream"] = dense + (2 * q if c.vendor else 0)  # the vendor's kernel keeps as much again, twice
    if kind in ("moba", "nsa", "ssa"):
        items["sparse stream"] = sparse + blocks
    if kind == "ssa" and c.rows > 1 and not torch_backend:
        items["gate"] += gate  # heads first, contiguous
    return items


def core_inputs(recipe: Recipe, c: Cut) -> dict[str, int]:
    """What selective recomputation starts from: rotated q and k, the projection that v is a view of, gate logits."""
    p, m = recipe.parallel, recipe.model
    query, projection = c.query, c.query + 2 * c.key
    if p.tensor > m.num_kv_heads:  # the group's queries, and the projection gathered over all tensor-parallel ranks
        query = m.num_heads // m.num_kv_heads * m.head_dim
        projection = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim
    tensors = (query + c.key + projection) * c.tokens
    return {"q, k, v": c.element * tensors, "gate": c.element * c.gates * c.tokens}


def head(c: Cut) -> dict[str, int]:
    """What the last stage keeps beyond its layers: the final norm, and the fp32 softmax of the cross-entropy."""
    return {"final norm": norm(c), "softmax": 4 * c.vocabulary * c.tokens + 9 * c.tokens}


def batch(recipe: Recipe, c: Cut) -> int:
    """cos and sin of the rotary table of one micro-batch in flight."""
    return 8 * recipe.model.head_dim * c.tokens
