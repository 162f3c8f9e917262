"""Topologies of one recipe on a number of GPUs: which are legal, which fit, which are fastest, which are nearest.

Only how the work is cut varies (parallel sizes, ZeRO stage, micro-batch, recompute); what is trained stays as it is, unless no
cut is legal: then the batch becomes the nearest that the processes can share. `parallel.topology` decides what is legal, so what
it opens up appears here by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ssa_megatron.config import Recipe
from ssa_megatron.parallel import topology
from ssa_megatron.planning.hardware import Hardware
from ssa_megatron.planning.memory import Memory, memory
from ssa_megatron.planning.step_time import Speed, speed

SLACK = 0.04  # of allocated bytes: what the caching allocator holds beyond them; 1 to 9 % in our runs
FEWEST_TOKENS = 1024  # of a row on one context-parallel rank
NEAR = 4096  # copies of the model, by which another number of processes may differ to be offered


@dataclass(frozen=True)
class Candidate:
    """One way to run a recipe, with its bytes and its time."""

    recipe: Recipe
    world: int
    stages: list[Memory]
    """The first and, with a pipeline, the last stage: those between need less than the first."""
    speed: Speed
    needed: int
    """Bytes of the fullest GPU, allocator slack and everything outside the allocator included."""

    @property
    def fullest(self) -> Memory:
        return max(self.stages, key=lambda stage: stage.peak)


def evaluate(recipe: Recipe, world: int, gpu: Hardware, *, document: int | None = None) -> Candidate:
    """Bytes and seconds of a legal recipe."""
    stages = memory(recipe, world, document=document)
    needed = int(max(stage.peak for stage in stages) * (1 + SLACK)) + gpu.outside
    return Candidate(recipe, world, stages, speed(recipe, world, gpu, document=document), needed)


def legal(recipe: Recipe, world: int, gpu: Hardware) -> Iterator[Recipe]:
    """Every legal way to cut `recipe` over `world` processes that is worth a look; its own sizes are looked at in any case."""
    m, p, zero, train = recipe.model, recipe.parallel, recipe.zero, recipe.train
    tensors = {t for t in (1, 2, 4, 8, 16) if t <= min(gpu.node, world)} | {p.tensor}
    contexts = {c for c in (1, 2, 4, 8, 16, 32, 64) if c == 1 or c * FEWEST_TOKENS <= train.sequence_length} | {
        p.context
    }
    pipelines = {n for n in range(1, m.num_layers + 1) if m.num_layers % n == 0}
    rows = {r for r in (1, 2, 4, 8) if train.global_batch_rows % r == 0} | {train.micro_batch_rows}
    modes, zeros = ("none", "selective", "full"), list(product((1, 2, 3), {zero.offload_optimizer, False}))
    for tensor, context, pipeline in product(sorted(tensors), sorted(contexts), sorted(pipelines)):
        ranks = tensor * context * pipeline
        if ranks > world or world % ranks:
            continue
        considered = {1, 2, 4, p.virtual_pipeline} if pipeline > 1 else {1}
        interleavings = sorted(v for v in considered if m.num_layers % (pipeline * v) == 0)
        sequences = {tensor > 1 and train.sequence_length % (tensor * context) == 0}
        if tensor == p.tensor:
            sequences.add(p.sequence)
        for sequence, virtual, (stage, offload), micro, mode in product(
            sorted(sequences), interleavings, zeros, sorted(rows), modes
        ):
            parallel = {
                "tensor": tensor,
                "sequence": sequence,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "context": context,
            }
            found = recipe.model_copy(
                update={
                    "parallel": p.model_copy(update=parallel),
                    "zero": zero.model_copy(update={"stage": stage, "offload_optimizer": offload}),
                    "train": train.model_copy(update={"micro_batch_rows": micro, "recompute": mode}),
                }
            )
            if topology.first_broken(found, world) is None:
                yield found


def fitting(recipe: Recipe, world: int, gpu: Hardware, *, document: int | None = None) -> list[Candidate]:
    """Of every legal way those that fit."""
    every = (evaluate(found, world, gpu, document=document) for found in legal(recipe, world, gpu))
    return [candidate for candidate in every if candidate.needed <= gpu.memory]


def ranked(candidates: list[Candidate]) -> list[Candidate]:
    """The best candidate of each topology and ZeRO stage, fastest first; of equally fast ones the smaller."""
    best: dict[tuple, Candidate] = {}
    for candidate in sorted(candidates, key=_order):
        found = candidate.recipe
        best.setdefault((*found.parallel.model_dump().values(), found.zero.stage), candidate)
    return list(best.values())


def _order(candidate: Candidate) -> tuple[float, int]:
    return float(f"{candidate.speed.seconds:.6g}"), candidate.needed


def changes(old: Recipe, new: Recipe) -> list[str]:
    """Overrides that turn the cut and the batch of `old` into those of `new`."""
    found = []
    for section in ("parallel", "zero", "train"):
        before, after = getattr(old, section).model_dump(), getattr(new, section).model_dump()
        found += [f"{section}.{k}={str(v).lower()}" for k, v in after.items() if v != before[k]]
    return found


def nearest(recipe: Recipe, candidates: list[Candidate], count: int = 2) -> list[str]:
    """Of `candidates`, those that change the recipe least, as overrides for the command line; then the faster first.

    One that only adds to another's changes is no second way, and comes last.
    """
    order = sorted(candidates, key=lambda c: (len(changes(recipe, c.recipe)), c.speed.seconds))
    ways: list[list[str]] = []
    more: list[list[str]] = []
    for candidate in order:
        if len(ways) == count:
            break
        found = changes(recipe, candidate.recipe)
        (more if any(set(way) < set(found) for way in ways) else ways).append(found)
    return [" ".join(way) for way in (ways + more)[:count]]


def check(recipe: Recipe, world: int, gpu: Hardware) -> None:
    """`topology.check`, whose refusal also names two ways to run this recipe on this many processes."""
    rule = topology.first_broken(recipe, world)
    if rule is None:
        return
    found = nearest(recipe, fitting(recipe, world, gpu)) or nearest(recipe, _evaluated(recipe, world, gpu))
    for other in _other_batches(recipe, world):
        if len(found) >= 2:
            break
        found += nearest(recipe, _evaluated(other, world, gpu), count=1)
    remedy = rule.remedy
    if found:  # none, if no way of cutting mends it
        remedy += f"; legal for {world} process(es): {', or '.join(found)}"
    if worlds := _other_worlds(recipe, world):
        remedy += f"; as it is, legal for {' or '.join(map(str, worlds))}"
    raise topology.refusal(rule, recipe, world, remedy=remedy)


def _evaluated(recipe: Recipe, world: int, gpu: Hardware) -> list[Candidate]:
    return [evaluate(found, world, gpu) for found in legal(recipe, world, gpu)]


def _other_batches(recipe: Recipe, world: int) -> Iterator[Recipe]:
    """The recipe with rows that `world` processes can share evenly, the nearest numbers first: there is always a legal cut."""
    train = recipe.train
    unit = world * train.micro_batch_rows
    below = train.global_batch_rows // unit * unit
    batches = sorted(
        (n for n in (below, below + unit, below + 2 * unit) if n), key=lambda n: abs(n - train.global_batch_rows)
    )
    rows = -(-train.eval_rows // world) * world if train.eval_interval else train.eval_rows
    for batch, evaluated in (
        (train.global_batch_rows, rows),
        *((n, train.eval_rows) for n in batches),
        *((n, rows) for n in batches),
    ):
        update = {"global_batch_rows": batch, "eval_rows": evaluated}
        if update != {name: getattr(train, name) for name in update}:
            yield recipe.model_copy(update={"train": train.model_copy(update=update)})


def _other_worlds(recipe: Recipe, world: int) -> list[int]:
    """The nearest smaller and the nearest larger number of processes that can run the recipe as it is, if they are near."""
    ranks = topology.model_ranks(recipe)
    below = max(0, world - 1) // ranks * ranks
    fewer = range(below, max(0, below - NEAR * ranks), -ranks)
    more = range((world // ranks + 1) * ranks, min(2 * world, world + NEAR * ranks) + ranks + 1, ranks)

    def runs(size: int) -> bool:
        return topology.first_broken(recipe, size) is None

    return [size for size in (next(filter(runs, sizes), None) for sizes in (fewer, more)) if size]
