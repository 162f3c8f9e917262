"""Bytes on one rank, item by item, and the moment of a step at which most of them are alive.

Weights, gradients, masters and moments (the optimizer's state) are exact. Activations are what autograd keeps (activations.py);
each phase adds what it works with. The peak is the largest phase: at these vocabularies mostly the loss, whose fp32 logits are
alive together with every layer's activations. The optimizer's step needs less than either: nothing of the forward is left.
"""

from dataclasses import dataclass

from ssa_megatron.config import Recipe
from ssa_megatron.optim import optimizer_of
from ssa_megatron.planning import activations
from ssa_megatron.planning.rank_shapes import Parameters, RankShapes, parameters, rank_shapes

ALL_REDUCE_BUCKET = 500_000_000  # elements; DeepSpeed's constant for BF16_Optimizer
WORKSPACES = 76 * 10**6  # of cuBLAS and others, from the allocator; measured on an H100
LIVE_PARAMETERS = 1_000_000_000  # elements ZeRO-3 keeps gathered at most; DeepSpeed's default


@dataclass(frozen=True)
class Memory:
    """One rank of one pipeline stage. Bytes."""

    stage: int
    states: dict[str, int]
    """What lives through the whole step."""
    kept: dict[str, int]
    """Activations of all micro-batches in flight, by item."""
    phases: dict[str, int]
    """What each phase of a step needs, states and activations included."""
    in_flight: float
    """Micro-batches whose activations this stage holds at once (a fraction under an interleaved schedule)."""
    host: int = 0
    """Masters and moments in host memory, when offloaded."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)


def memory(recipe: Recipe, world: int, *, document: int | None = None) -> list[Memory]:
    """A rank of the first and of the last pipeline stage; those between hold less than the first.

    document: tokens of a typical document in a row; None for rows that are one document each.
    """
    c, last = rank_shapes(recipe, world, document=document), recipe.parallel.pipeline - 1
    return [stage_memory(recipe, c, stage) for stage in sorted({0, last})]


def padded(elements: int, shards: int) -> int:
    """Elements of a group after DeepSpeed's flattening: a multiple of 2 * shards."""
    return -(-elements // (2 * shards)) * 2 * shards


def states(recipe: Recipe, c: RankShapes, held: Parameters) -> tuple[dict[str, int], int]:
    """(bytes on the device by item, bytes in host memory) of weights, gradients, masters and moments."""
    groups = [sum(held.matrices), sum(held.vectors)]
    flat, stage = sum(padded(group, c.shards) for group in groups if group), recipe.zero.stage
    share = flat // c.shards
    if stage == 3:  # every parameter is padded to a multiple of the shards by itself
        share = sum(-(-p // c.shards) for p in held.matrices + held.vectors)
    # ZeRO-1 in bf16 accumulates into a flat fp32 buffer; in fp32 gradients are the parameters' own
    gradients = 4 * share if stage > 1 else 4 * (flat if c.element == 2 else held.count)
    found = {"weights": c.element * (share if stage == 3 else flat), "gradients (fp32)": gradients}
    optimizer = {"masters (fp32)": 4 * share, "moments (fp32)": optimizer_of(recipe).bytes_per_parameter * share}
    if recipe.zero.offload_optimizer:
        return found, sum(optimizer.values())
    return found | optimizer, 0


def reduce_buffers(recipe: Recipe, c: RankShapes) -> int:
    """Where ZeRO-2 and 3 collect gradients to reduce them; bf16 gradients are reduced as an fp32 copy."""
    elements = recipe.zero.reduce_bucket_mb * 2**20 // 4
    return (c.element + (4 if c.element == 2 else 0)) * elements


def in_flight(recipe: Recipe, c: RankShapes, stage: int) -> float:
    """Micro-batches of which stage `stage` holds activations at once, under 1F1B or its interleaved form."""
    p = recipe.parallel
    if p.virtual_pipeline == 1:
        return min(p.pipeline - stage, c.micro_batches)
    warm_up = 2 * (p.pipeline - stage - 1) + (p.virtual_pipeline - 1) * p.pipeline + 1  # of chunks
    return min(warm_up, c.micro_batches * p.virtual_pipeline) / p.virtual_pipeline


def stage_memory(recipe: Recipe, c: RankShapes, stage: int) -> Memory:
    m, p, mode = recipe.model, recipe.parallel, recipe.train.recompute
    held = parameters(recipe, stage)
    resident, host = states(recipe, c, held)
    resident["libraries' workspaces"] = WORKSPACES if c.element == 2 else 0
    resident["batches of a step"] = c.micro_batches * c.tokens * 25  # tokens, labels, positions; counted
    if recipe.zero.stage > 1:
        resident["reduce buffers"] = reduce_buffers(recipe, c)
    if recipe.zero.stage == 3:
        resident["gathered weights"] = c.element * min(held.count, max(2 * held.largest, LIVE_PARAMETERS))
    last, count = stage == p.pipeline - 1, in_flight(recipe, c, stage)

    kept = {item: int(count * c.layers * b) for item, b in activations.layer(recipe, c, mode).items()}
    kept["rotary tables"] = int(count * activations.batch(recipe, c))
    boundary = c.element * c.hidden * c.stream_tokens
    if p.pipeline > 1:  # stage inputs and outputs stay with the schedule; two receive buffers
        kept["stage boundaries"] = int((2 * count + 2) * boundary)
    if last:
        kept["final norm"] = activations.norm(c)

    fixed = sum(resident.values())
    base = fixed + sum(kept.values())
    one = sum(kept.values()) / count
    cast = 4 if c.element == 2 else 0  # a bf16 gradient is cast to fp32 to be accumulated
    embedding = c.vocabulary * m.hidden_size
    tied_here = m.tied_embeddings and p.pipeline == 1
    waiting = (
        c.element * embedding if tied_here else 0
    )  # the output layer's gradient, until the embedding's is added to it
    final_norm = kept.get("final norm", 0)
    phases = {"layer backward": base - final_norm + waiting + _layer_backward(recipe, c)}
    if last:
        padding = c.element * c.vocabulary * c.tokens if c.vocabulary * p.tensor != m.vocab_size else 0
        logits = c.vocabulary * c.tokens
        phases["loss"] = base + (4 + (c.element if cast else 0)) * logits + padding
        phases["head gradient"] = base + c.element * (logits + embedding) + (0 if tied_here else cast * embedding)
        three_wide_and_one = (12 + c.element) * c.hidden * c.stream_tokens
        phases["final norm backward"] = base + waiting + three_wide_and_one
    if stage == 0:
        copies = 2 if tied_here else 1
        phases["embedding gradient"] = int(base - one) + (copies * c.element + cast) * embedding
    together = recipe.zero.stage == 1 and c.element == 2 and sum(held.matrices) <= ALL_REDUCE_BUCKET
    # DeepSpeed copies the groups of one bucket into one tensor to reduce them
    phases["step"] = fixed + (resident["gradients (fp32)"] if together else 0)
    return Memory(stage, resident, kept, phases, count, host)


def _layer_backward(recipe: Recipe, c: RankShapes) -> int:
    """What one layer's backward works with, its recomputed activations included."""
    weight, cast = c.ffn * c.hidden, 4 if c.element == 2 else 0
    wide = c.element * c.ffn * c.tokens  # one gradient inside the MLP: two at once, or one beside the weight's gradient
    mlp = max(2 * wide, wide + c.element * weight, (c.element + cast) * weight)
    mlp += (3 if recipe.parallel.sequence else 2) * c.element * c.hidden * c.tokens
    mode = recipe.train.recompute
    if mode == "none":
        found = mlp
    elif mode == "full":
        found = mlp + sum(activations.layer(recipe, c, "none").values())
    else:  # when the attention core runs again the layer's MLP is done and freed
        core = sum(activations.core(recipe, c).values()) + 4 * c.element * c.query * c.tokens
        found = max(mlp, core - 5 * c.element * c.ffn * c.tokens)
    return found + (activations.SCORE_TILES if recipe.attention.backend == "torch" else 0)
