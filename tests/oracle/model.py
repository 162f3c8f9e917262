"""The referee: a whole language model in one file of slow, obvious PyTorch, written from the method alone.

It shares no code with what it judges. Attention is computed one document at a time, so nothing can cross a document
boundary by construction; every mask is materialised; gradients are autograd's; arithmetic is in the weights' own dtype
(fp64 is the intended one) except the rotary angles, which are always computed in fp64 and then rounded.

Shapes inside one document: n tokens, H query heads, K key/value heads, D head dim, M complete blocks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("ssa", "full", "moba", "nsa")
TRUNKS = ("full", "sparse")


@dataclass(frozen=True)
class OracleConfig:
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    rope_theta: float = 500000.0
    norm_eps: float = 1e-5
    tied: bool = True
    kind: str = "ssa"
    block_size: int = 16
    block_count: int = 16
    window: int = 128
    alignment_weight: float = 10.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, not {self.kind!r}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError("num_heads must be a multiple of num_kv_heads")
        if self.head_dim % 2:
            raise ValueError("head_dim must be even: the rotary halves pair up")
        if min(self.block_size, self.block_count, self.window) < 1:
            raise ValueError("block_size, block_count and window must be at least 1")

    @property
    def gates(self) -> int:
        return 3 if self.kind == "nsa" else 1


# ---------------------------------------------------------------------------------------------------------- weights
def weight_shapes(config: OracleConfig) -> dict[str, tuple[int, ...]]:
    """Every global name with its shape, in the order the model meets them."""
    c = config
    q_size, kv_size = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (c.vocab_size, c.hidden_size)}
    for i in range(c.num_layers):
        layer = f"model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (c.hidden_size,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (q_size, c.hidden_size)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (kv_size, c.hidden_size)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (kv_size, c.hidden_size)
        shapes[f"{layer}.self_attn.g_proj.weight"] = (c.num_heads * c.gates, c.hidden_size)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (c.hidden_size, q_size)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (c.hidden_size,)
        shapes[f"{layer}.mlp.gate_proj.weight"] = (c.ffn_size, c.hidden_size)
        shapes[f"{layer}.mlp.up_proj.weight"] = (c.ffn_size, c.hidden_size)
        shapes[f"{layer}.mlp.down_proj.weight"] = (c.hidden_size, c.ffn_size)
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tied:
        shapes["lm_head.weight"] = (c.vocab_size, c.hidden_size)
    return shapes


def random_weights(
    config: OracleConfig, seed: int, std: float = 0.02, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """N(0, std) for matrices, 1 + N(0, std) for norms. Drawn in fp64: one seed is one model in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in weight_shapes(config).items():
        value = std * torch.randn(shape, generator=generator, dtype=torch.float64)
        if len(shape) == 1:
            value = 1.0 + value
        weights[name] = value.to(dtype)
    return weights


# ------------------------------------------------------------------------------------------------------- small parts
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, theta: float) -> Tensor:
    """x [n, heads, D] of one document, positions 0..n-1. Element i pairs with element i + D/2."""
    n, _, dim = x.shape
    half = dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) * 2 / dim)
    angle = torch.arange(n, dtype=torch.float64, device=x.device)[:, None] * frequency[None, :]
    cos, sin = angle.cos().to(x.dtype)[:, None, :], angle.sin().to(x.dtype)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last axis among the entries where mask is true; a row without any is all zeros."""
    some = mask.any(-1, keepdim=True)
    scores = torch.where(mask, scores, float("-inf"))
    scores = torch.where(some, scores, 0.0)
    return torch.where(some, torch.softmax(scores, dim=-1), 0.0)


def smooth_l1(a: Tensor, b: Tensor) -> Tensor:
    """beta 1, mean over every element."""
    distance = (a - b).abs()
    return torch.where(distance < 1.0, 0.5 * distance * distance, distance - 0.5).mean()


def alignment_of(full: Tensor, sparse: Tensor) -> Tensor:
    """L_layer of two gated outputs: sparsity (full moves toward sparse) + commitment (sparse moves toward full)."""
    return smooth_l1(full, sparse.detach()) + smooth_l1(full.detach(), sparse)


# ------------------------------------------------------------------------------------------- attention, one document
def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """[n, K, D] to [n, H, D]: query head h reads key/value head h // (H / K)."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [n, H, D], k and v [m, H, D], mask [H, n, m] or [n, m], true where the query sees the key."""
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("hqk,khd->qhd", masked_softmax(scores, mask.expand_as(scores)), v)


def causal_mask(n: int, device: torch.device) -> Tensor:
    t = torch.arange(n, device=device)
    return t[None, :] <= t[:, None]


def pool(x: Tensor, block_size: int) -> Tensor:
    """Mean over each complete block: [n, K, D] to [M, K, D], M = n // block_size."""
    count = x.shape[0] // block_size
    return x[: count * block_size].reshape(count, block_size, *x.shape[1:]).mean(1)


def complete_mask(n: int, count: int, block_size: int, device: torch.device) -> Tensor:
    """[n, M]: block j is complete at token t, (j + 1) * b <= t + 1."""
    t, j = torch.arange(n, device=device), torch.arange(count, device=device)
    return (j[None, :] + 1) * block_size <= t[:, None] + 1


@torch.no_grad()
def block_scores(q: Tensor, k: Tensor, config: OracleConfig) -> Tensor:
    """s(j) per key/value head: [K, n, M]. The own block is in the softmax at the token that completes it."""
    n, heads, dim = q.shape
    pooled = repeat_heads(pool(k, config.block_size), heads)
    scores = torch.einsum("qhd,jhd->hqj", q, pooled) * dim**-0.5
    complete = complete_mask(n, pooled.shape[0], config.block_size, q.device)
    p = masked_softmax(scores, complete.expand_as(scores))
    return p.reshape(k.shape[1], heads // k.shape[1], n, pooled.shape[0]).sum(1)


@torch.no_grad()
def select_from_scores(scores: Tensor, n: int, config: OracleConfig) -> Tensor:
    """scores [K, n, M] to selected [K, n, ceil(n / b)]: the own block and the k - 1 best blocks strictly before it."""
    b, device = config.block_size, scores.device
    total = -(-n // b)
    own = torch.arange(n, device=device) // b
    j = torch.arange(scores.shape[-1], device=device)
    candidate = (j[None, :] < own[:, None]).expand_as(scores)
    ranked = torch.where(candidate, scores, float("-inf")).argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(candidate, dtype=torch.bool).scatter(-1, ranked[..., : config.block_count - 1], True)
    selected = torch.zeros(scores.shape[0], n, total, dtype=torch.bool, device=device)
    selected[..., : scores.shape[-1]] = chosen & candidate
    selected[:, torch.arange(n, device=device), own] = True
    return selected


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, config: OracleConfig) -> Tensor:
    """[K, n, ceil(n / b)]: the blocks each token of each key/value head attends to."""
    return select_from_scores(block_scores(q, k, config), q.shape[0], config)


def full_stream(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, heads, _ = q.shape
    return attend(q, repeat_heads(k, heads), repeat_heads(v, heads), causal_mask(n, q.device))


def sparse_mask(q: Tensor, k: Tensor, config: OracleConfig) -> Tensor:
    """[H, n, n]: token t of head h sees the tokens <= t of its selected blocks."""
    n, heads, _ = q.shape
    block_of = torch.arange(n, device=q.device) // config.block_size
    seen = select_blocks(q, k, config)[:, :, block_of] & causal_mask(n, q.device)
    return seen.repeat_interleave(heads // k.shape[1], dim=0)


def sparse_stream(q: Tensor, k: Tensor, v: Tensor, config: OracleConfig) -> Tensor:
    heads = q.shape[1]
    return attend(q, repeat_heads(k, heads), repeat_heads(v, heads), sparse_mask(q, k, config))


def compressed_stream(q: Tensor, k: Tensor, v: Tensor, config: OracleConfig) -> Tensor:
    n, heads, _ = q.shape
    k_pooled, v_pooled = pool(k, config.block_size), pool(v, config.block_size)
    if k_pooled.shape[0] == 0:
        return torch.zeros_like(q)
    mask = complete_mask(n, k_pooled.shape[0], config.block_size, q.device)
    return attend(q, repeat_heads(k_pooled, heads), repeat_heads(v_pooled, heads), mask)


def window_stream(q: Tensor, k: Tensor, v: Tensor, config: OracleConfig) -> Tensor:
    n, heads, _ = q.shape
    t = torch.arange(n, device=q.device)
    mask = causal_mask(n, q.device) & (t[:, None] - t[None, :] < config.window)
    return attend(q, repeat_heads(k, heads), repeat_heads(v, heads), mask)


def document_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, config: OracleConfig, trunk: str
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """q [n, H, D] and k, v [n, K, D] before RoPE, gate [n, H, gates] after the sigmoid.

    Returns the trunk's output [n, H, D] and, for ssa, the gated full and sparse outputs.
    """
    q, k = rope(q, config.rope_theta), rope(k, config.rope_theta)
    if config.kind == "full":
        return gate * full_stream(q, k, v), None, None
    if config.kind == "moba":
        return gate * sparse_stream(q, k, v, config), None, None
    if config.kind == "nsa":
        compressed = gate[..., 0:1] * compressed_stream(q, k, v, config)
        selected = gate[..., 1:2] * sparse_stream(q, k, v, config)
        window = gate[..., 2:3] * window_stream(q, k, v, config)
        return compressed + selected + window, None, None
    full, sparse = gate * full_stream(q, k, v), gate * sparse_stream(q, k, v, config)
    return (full if trunk == "full" else sparse), full, sparse


# ----------------------------------------------------------------------------------------------------------- the model
def documents(starts: Tensor) -> list[tuple[int, int]]:
    """[N] document starts of one row to the (first, past the last) pairs of its documents."""
    values = starts.tolist()
    spans = []
    for t, start in enumerate(values):
        if start == t:
            spans.append((t, t + 1))
        elif spans and start == spans[-1][0]:
            spans[-1] = (start, t + 1)
        else:
            raise ValueError(f"doc_starts[{t}] = {start} is neither {t} nor the start of the document before it")
    return spans


def attention(
    weights: dict[str, Tensor], prefix: str, x: Tensor, doc_starts: Tensor, config: OracleConfig, trunk: str
) -> tuple[Tensor, Tensor]:
    """x [B, N, hidden], already normalised, to the projected output [B, N, hidden] and L_layer."""
    batch, length, _ = x.shape
    q = (x @ weights[f"{prefix}.q_proj.weight"].T).reshape(batch, length, config.num_heads, config.head_dim)
    k = (x @ weights[f"{prefix}.k_proj.weight"].T).reshape(batch, length, config.num_kv_heads, config.head_dim)
    v = (x @ weights[f"{prefix}.v_proj.weight"].T).reshape(batch, length, config.num_kv_heads, config.head_dim)
    gate = torch.sigmoid(x @ weights[f"{prefix}.g_proj.weight"].T)
    gate = gate.reshape(batch, length, config.num_heads, config.gates)
    outputs, fulls, sparses = [], [], []
    for row in range(batch):
        for first, last in documents(doc_starts[row]):
            part = slice(first, last)
            output, full, sparse = document_attention(
                q[row, part], k[row, part], v[row, part], gate[row, part], config, trunk
            )
            outputs.append(output)
            fulls.append(full)
            sparses.append(sparse)
    output = torch.cat(outputs).reshape(batch, length, config.num_heads * config.head_dim)
    alignment = alignment_of(torch.cat(fulls), torch.cat(sparses)) if config.kind == "ssa" else x.new_zeros(())
    return output @ weights[f"{prefix}.o_proj.weight"].T, alignment


def mlp(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate = x @ weights[f"{prefix}.gate_proj.weight"].T
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    return (gate * torch.sigmoid(gate) * up) @ weights[f"{prefix}.down_proj.weight"].T


def forward(
    weights: dict[str, Tensor], config: OracleConfig, tokens: Tensor, doc_starts: Tensor, trunk: str = "full"
) -> tuple[Tensor, list[Tensor]]:
    """Logits [B, N, V] and one L_layer per layer."""
    if trunk not in TRUNKS:
        raise ValueError(f"trunk must be one of {TRUNKS}, not {trunk!r}")
    if tokens.shape != doc_starts.shape:
        raise ValueError(f"tokens {tuple(tokens.shape)} and doc_starts {tuple(doc_starts.shape)} differ in shape")
    x = weights["model.embed_tokens.weight"][tokens]
    alignments = []
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], config.norm_eps)
        output, alignment = attention(weights, f"{layer}.self_attn", normed, doc_starts, config, trunk)
        x = x + output
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], config.norm_eps)
        x = x + mlp(weights, f"{layer}.mlp", normed)
        alignments.append(alignment)
    x = rms_norm(x, weights["model.norm.weight"], config.norm_eps)
    head = weights["model.embed_tokens.weight"] if config.tied else weights["lm_head.weight"]
    return x @ head.T, alignments


def logits(
    weights: dict[str, Tensor], config: OracleConfig, tokens: Tensor, doc_starts: Tensor, trunk: str = "full"
) -> Tensor:
    return forward(weights, config, tokens, doc_starts, trunk)[0]


def counted_targets(doc_starts: Tensor) -> Tensor:
    """[B, N - 1]: position t predicts token t + 1, which counts only inside the same document."""
    return doc_starts[:, 1:] == doc_starts[:, :-1]


def losses(
    weights: dict[str, Tensor], config: OracleConfig, tokens: Tensor, doc_starts: Tensor, trunk: str = "full"
) -> tuple[Tensor, Tensor]:
    """(cross-entropy, mean over the batch's counted targets; alignment, mean over layers, 0 unless ssa)."""
    scores, alignments = forward(weights, config, tokens, doc_starts, trunk)
    log_p = torch.log_softmax(scores[:, :-1], dim=-1)
    negative_log_p = -log_p.gather(-1, tokens[:, 1:, None])[..., 0]
    counted = counted_targets(doc_starts)
    ce = torch.where(counted, negative_log_p, 0.0).sum() / max(int(counted.sum()), 1)
    return ce, torch.stack(alignments).mean()


def total_loss(
    weights: dict[str, Tensor], config: OracleConfig, tokens: Tensor, doc_starts: Tensor, trunk: str = "full"
) -> Tensor:
    ce, alignment = losses(weights, config, tokens, doc_starts, trunk)
    return ce + config.alignment_weight * alignment
