"""Topologies of one recipe on a number of GPUs: which are legal, which fit, which are fastest.

Only how the work is cut varies (parallel sizes, ZeRO stage, micro-batch, recompute); what is trained stays as it is.
`parallel.topology.check` decides what is legal, so what it opens up appears here by itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from ssa_megatron.config import Recipe
from ssa_megatron.errors import ConfigError
from ssa_megatron.parallel import topology
from ssa_megatron.planning.hardware import Hardware
from ssa_megatron.planning.memory import Memory, memory
from ssa_megatron.planning.speed import Speed, speed

SLACK = 0.04  # of allocated bytes: what the caching allocator holds beyond them; 1 to 9 % in our runs
FEWEST_TOKENS = 1024  # of a row on one context-parallel rank


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
    """Every legal way to cut `recipe` over `world` processes that is worth a look."""
    m, train = recipe.model, recipe.train
    tensors = [t for t in (1, 2, 4, 8, 16) if t <= min(gpu.node, world)]
    contexts = [c for c in (1, 2, 4, 8, 16, 32, 64) if c == 1 or c * FEWEST_TOKENS <= train.sequence_length]
    pipelines = [p for p in range(1, m.num_layers + 1) if m.num_layers % p == 0]
    rows = [r for r in (1, 2, 4, 8) if train.global_batch_rows % r == 0]
    for tensor, context, pipeline in product(tensors, contexts, pipelines):
        ranks = tensor * context * pipeline
        if ranks > world or world % ranks:
            continue
        interleavings = [v for v in (1, 2, 4) if v == 1 or (pipeline > 1 and m.num_layers % (pipeline * v) == 0)]
        for virtual, stage, micro, mode in product(interleavings, (1, 2, 3), rows, ("none", "selective", "full")):
            parallel = {
                "tensor": tensor,
                "sequence": tensor > 1 and train.sequence_length % (tensor * context) == 0,
                "pipeline": pipeline,
                "virtual_pipeline": virtual,
                "context": context,
            }
            found = recipe.model_copy(
                update={
                    "parallel": recipe.parallel.model_copy(update=parallel),
                    "zero": recipe.zero.model_copy(update={"stage": stage}),
                    "train": train.model_copy(update={"micro_batch_rows": micro, "recompute": mode}),
                }
            )
            if not any(rule.broken(found, world) for rule in topology.RULES):
                yield found


def ranked(recipe: Recipe, world: int, gpu: Hardware, *, document: int | None = None) -> list[Candidate]:
    """The best candidate of each topology and ZeRO stage that fits, fastest first; of equally fast ones the smaller."""
    best: dict[tuple, Candidate] = {}
    for cut_recipe in legal(recipe, world, gpu):
        candidate = evaluate(cut_recipe, world, gpu, document=document)
        kind = (*cut_recipe.parallel.model_dump().values(), cut_recipe.zero.stage)
        if candidate.needed <= gpu.memory and (kind not in best or _order(candidate) < _order(best[kind])):
            best[kind] = candidate
    return sorted(best.values(), key=_order)


def _order(candidate: Candidate) -> tuple[float, int]:
    return round(candidate.speed.seconds, 4), candidate.needed


def changes(old: Recipe, new: Recipe) -> list[str]:
    """Overrides that turn the cut of `old` into that of `new`."""
    found = []
    for section in ("parallel", "zero", "train"):
        before, after = getattr(old, section).model_dump(), getattr(new, section).model_dump()
        found += [f"{section}.{k}={str(v).lower()}" for k, v in after.items() if v != before[k]]
    return found


def alternatives(recipe: Recipe, world: int, gpu: Hardware, candidates: list[Candidate], count: int = 2) -> list[str]:
    """Of `candidates`, those that change the recipe least, as overrides for the command line; then the faster first."""
    nearest = sorted(candidates, key=lambda c: (len(changes(recipe, c.recipe)), c.speed.seconds))
    return [" ".join(changes(recipe, c.recipe)) for c in nearest[:count]]


def check(recipe: Recipe, world: int, gpu: Hardware) -> None:
    """`topology.check`, whose refusal also names two ways to run this recipe on this many processes."""
    try:
        topology.check(recipe, world)
    except ConfigError as refusal:
        found = alternatives(recipe, world, gpu, ranked(recipe, world, gpu))
        legal_here = f"; legal for {world} process(es): {', or '.join(found)}" if found else ""
        raise ConfigError(refusal.problem, remedy=refusal.remedy + legal_here) from None
