"""What one rank sends in a step, by process group: which collective, of how many bytes, how often.

`payload` is the size of the whole tensor a collective makes or sums; `wire` what a ring makes one rank send for it. A test
counts the payloads of real runs. Scalars (norms, losses, agreements) are left out.
"""

from dataclasses import dataclass

from ssa_megatron.config import Recipe
from ssa_megatron.planning.memory import padded
from ssa_megatron.planning.rank_shapes import RankShapes, parameters, rank_shapes

PERSISTENT = 100_000  # elements below which ZeRO-3 keeps a parameter whole; DeepSpeed's default


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one rank, summed over a step."""

    group: str
    """tensor, context, pipeline or data (the group ZeRO shards over)."""
    what: str
    operation: str
    """all-reduce, all-gather, reduce-scatter or send."""
    payload: int
    ranks: int

    @property
    def wire(self) -> int:
        """Bytes this rank sends."""
        if self.operation == "send":
            return self.payload
        passes = 2 if self.operation == "all-reduce" else 1
        return int(passes * (self.ranks - 1) / self.ranks * self.payload)


def traffic(recipe: Recipe, world: int, stage: int = 0) -> list[Traffic]:
    """A step of a rank of pipeline stage `stage`."""
    c = rank_shapes(recipe, world)
    found = _tensor(recipe, c, stage) + _context(recipe, c) + _pipeline(recipe, c, stage) + _data(recipe, c, stage)
    return [t for t in found if t.ranks > 1 and t.payload]


def _tensor(recipe: Recipe, c: RankShapes, stage: int) -> list[Traffic]:
    p, m = recipe.parallel, recipe.model
    again = recipe.train.recompute == "full"  # layers run forward twice
    stream, times = c.element * c.hidden * c.tokens, c.micro_batches
    first, last = stage == 0, stage == p.pipeline - 1
    # column-parallel: q/k/v, gate, MLP in; row-parallel: attention out, MLP out
    if p.sequence:
        # inputs in forward and again for their weights' gradient; the gradients of outputs that were scattered
        gathers = c.layers * (3 * (2 + again) + 2) + first + 2 * last
        scatters = c.layers * (2 * (1 + again) + 3) + first + last
        found = [
            Traffic("tensor", "activations", "all-gather", gathers * stream * times, p.tensor),
            Traffic("tensor", "activations", "reduce-scatter", scatters * stream * times, p.tensor),
            Traffic("tensor", "norm gradients", "all-reduce", 4 * m.hidden_size * (2 * c.layers + last), p.tensor),
        ]
    else:
        sums = c.layers * (2 * (1 + again) + 3) + first + last
        found = [Traffic("tensor", "activations", "all-reduce", sums * stream * times, p.tensor)]
    if p.tensor > m.num_kv_heads:  # a shared key/value head: the projection is gathered, its gradient scattered
        projection = c.element * (m.num_heads + 2 * m.num_kv_heads) * m.head_dim * c.tokens * c.layers * times
        found.append(Traffic("tensor", "shared heads", "all-gather", projection * (1 + again), p.tensor))
        found.append(Traffic("tensor", "shared heads", "reduce-scatter", projection, p.tensor))
    if last:  # maximum, target logit and sum of exponentials
        found.append(Traffic("tensor", "loss", "all-reduce", 12 * c.tokens * times, p.tensor))
    return found


def _context(recipe: Recipe, c: RankShapes) -> list[Traffic]:
    size = recipe.parallel.context
    keys = 2 * c.element * c.key * c.key_tokens * c.layers * c.micro_batches
    forwards = 1 if recipe.train.recompute == "none" else 2
    return [
        Traffic("context", "keys and values", "all-gather", forwards * keys, size),
        Traffic("context", "their gradients", "reduce-scatter", keys, size),
    ]


def _pipeline(recipe: Recipe, c: RankShapes, stage: int) -> list[Traffic]:
    p = recipe.parallel
    boundary = c.element * c.hidden * c.stream_tokens * c.micro_batches
    # each chunk of layers sends activations forward and gradients back, but for the model's two ends
    edges = 2 * p.virtual_pipeline - (stage == 0) - (stage == p.pipeline - 1)
    found = [Traffic("pipeline", "activations and gradients", "send", edges * boundary, p.pipeline)]
    if recipe.model.tied_embeddings and p.pipeline > 1 and stage in (0, p.pipeline - 1):
        tied = 4 * c.vocabulary * c.hidden
        found.append(Traffic("pipeline", "tied embedding's gradient", "all-reduce", tied, 2))
    return found


def _data(recipe: Recipe, c: RankShapes, stage: int) -> list[Traffic]:
    held = parameters(recipe, stage)
    flat = sum(padded(n, c.shards) for n in (sum(held.matrices), sum(held.vectors)))
    weights = c.element * flat
    if recipe.zero.stage == 1:
        return [
            Traffic("data", "gradients (fp32)", "all-reduce", 4 * flat, c.shards),
            Traffic("data", "weights", "all-gather", weights, c.shards),
        ]
    # ZeRO-2 and 3 reduce each micro-batch's gradients as they appear, in buckets; ZeRO-2 to all ranks, which keep their part
    reduced = 4 * flat * c.micro_batches
    if recipe.zero.stage == 2:
        return [
            Traffic("data", "gradients (fp32)", "all-reduce", reduced, c.shards),
            Traffic("data", "weights", "all-gather", weights, c.shards),
        ]
    small = sum(n for n in held.matrices + held.vectors if n < PERSISTENT)  # gathered once a step
    gathered = small + 2 * c.micro_batches * (held.count - small)  # forward and backward
    return [
        Traffic("data", "gradients (fp32)", "reduce-scatter", reduced, c.shards),
        Traffic("data", "weights", "all-gather", c.element * gathered, c.shards),
    ]
