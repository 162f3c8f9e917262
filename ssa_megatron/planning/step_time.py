"""Seconds of one optimizer step, part by part, and what follows: tokens per day, MFU.

A step is the slowest stage's micro-batches, the pipeline's bubble, communication that nothing hides, and the optimizer. Linear
layers are counted in FLOPs, element-wise kernels in bytes (they are not fused: norms, rotary embedding, SwiGLU and loss take as
long as half of the linear layers), attention by the kernels' measured rates.
"""

from dataclasses import dataclass

from ssa_megatron.config import Recipe
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.model.shapes import parameter_count
from ssa_megatron.optim import optimizer_of
from ssa_megatron.planning.communication import Traffic, traffic
from ssa_megatron.planning.hardware import Hardware
from ssa_megatron.planning.rank_shapes import RankShapes, parameters, rank_shapes

# Bytes moved by unfused element-wise kernels, forward and backward together, counted kernel by kernel
NORM_BYTES = 120  # per channel of one norm
ROTARY_BYTES = 60  # per query or key channel
MLP_BYTES = 42  # per channel of the MLP
RESIDUAL_BYTES = 20  # per channel of a layer
LOSS_BYTES = 54  # per logit
ACCUMULATE_BYTES = 18  # per parameter and micro-batch: a bf16 gradient cast and added to fp32
UPDATE_BYTES = 40  # per parameter and step: norm, clipping, master, working copy, zeroing; optimizer state comes on top
FORWARD_SHARE = 1 / 3  # of element-wise traffic and attention, that recomputation repeats


@dataclass(frozen=True)
class Speed:
    """Of a whole run; seconds are per optimizer step."""

    parts: dict[str, float]
    """Seconds of the slowest stage by part, the pipeline's bubble among them."""
    tokens: int
    """Tokens of a step."""
    mfu: float
    """Share of the GPUs' peak that weights and one causal attention over whole rows would need (6 N + 6 L h S a token)."""

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_day(self) -> float:
        return self.tokens_per_second * 86400


def speed(recipe: Recipe, world: int, gpu: Hardware, *, document: int | None = None) -> Speed:
    """document: tokens of a typical document in a row; None for rows that are one document each."""
    c, p = rank_shapes(recipe, world, document=document), recipe.parallel
    stages = {0, p.pipeline - 1}
    slowest = max((_stage_parts(recipe, c, world, gpu, stage) for stage in stages), key=_total)
    bubble = (p.pipeline - 1) / (p.virtual_pipeline * c.micro_batches)
    parts = dict(slowest)
    if bubble:
        once = ("optimizer", "data-parallel")
        parts["pipeline bubble"] = bubble * sum(v for k, v in slowest.items() if k not in once)
    tokens = recipe.train.global_batch_rows * recipe.train.sequence_length
    needed = tokens * flops_per_token(recipe)
    return Speed(parts, tokens, needed / (sum(parts.values()) * gpu.peak_flops * world))


def flops_per_token(recipe: Recipe) -> float:
    """Forward and backward of every weight that multiplies (an untied input embedding does not) and one causal attention."""
    m = recipe.model
    weights = parameter_count(recipe) - (0 if m.tied_embeddings else m.vocab_size * m.hidden_size)
    return 6 * weights + 6 * m.num_layers * m.num_heads * m.head_dim * recipe.train.sequence_length


def _total(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _stage_parts(recipe: Recipe, c: RankShapes, world: int, gpu: Hardware, stage: int) -> dict[str, float]:
    m, p, mode = recipe.model, recipe.parallel, recipe.train.recompute
    last = stage == p.pipeline - 1
    times, tokens = c.micro_batches, c.tokens * c.micro_batches
    held = parameters(recipe, stage)
    embedding = c.vocabulary * m.hidden_size
    layers_again = 1 if mode == "full" else 0
    core_again = 0 if mode == "none" else 1

    flops = 2 * tokens * (sum(held.layers) * (3 + layers_again) + (3 * embedding if last else 0))
    layer_bytes = c.layers * (
        (2 * NORM_BYTES + RESIDUAL_BYTES) * c.hidden * c.stream_tokens / c.tokens
        + ROTARY_BYTES * (c.query + c.key)
        + MLP_BYTES * c.ffn
    )
    moved = tokens * layer_bytes * (1 + FORWARD_SHARE * layers_again)
    moved += tokens * (LOSS_BYTES * c.vocabulary + NORM_BYTES * c.hidden) if last else 0
    scale = c.element / 2  # counted for bf16
    parts = {
        "linear layers": flops / gpu.matmul * (1 if c.element == 2 else 2),
        "element-wise": moved * scale / gpu.bandwidth,
        "attention": tokens * c.layers * kind_of(recipe).seconds(c, gpu) * (1 + FORWARD_SHARE * core_again),
        "optimizer": ACCUMULATE_BYTES * times * held.count / gpu.bandwidth + update(recipe, c, held.count, gpu),
    }
    for t in traffic(recipe, world, stage):
        name = {"data": "data-parallel"}.get(t.group, f"{t.group}-parallel")
        parts[name] = parts.get(name, 0.0) + t.wire / bandwidth(recipe, t, world, gpu)
    return parts


def update(recipe: Recipe, c: RankShapes, count: int, gpu: Hardware) -> float:
    """Seconds of an update of this rank's share of `count` parameters; offloaded, gradients and weights cross the host link."""
    state = optimizer_of(recipe).bytes_per_parameter
    share, moved = count / c.shards, UPDATE_BYTES + 2 * state  # state is read and written
    if not recipe.zero.offload_optimizer:
        return moved * share / gpu.bandwidth
    return moved * share / gpu.host + (4 + c.element) * share / gpu.host_link


def bandwidth(recipe: Recipe, t: Traffic, world: int, gpu: Hardware) -> float:
    """Bytes/s of a group: the fast links while its ranks share a node; ranks are laid out tensor, context, data, pipeline."""
    p = recipe.parallel
    reach = {
        "tensor": p.tensor,
        "context": p.tensor * p.context,
        "data": p.tensor * t.ranks,
        "pipeline": world,
    }[t.group]
    return gpu.link if reach <= gpu.node else gpu.network
