"""What several tests here share: a tiny recipe, its rows, and steps made with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssa_megatron.config import Recipe, dump_recipe, resolve

TINY = {
    "name": "tiny",
    "model": {
        "vocab_size": 53,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 48,
        "max_sequence_length": 64,
        "rope_theta": 1000.0,
    },
    "attention": {"kind": "ssa", "block_size": 4, "block_count": 3, "window": 9},
    "train": {
        "steps": 20,
        "sequence_length": 33,
        "global_batch_rows": 4,
        "micro_batch_rows": 1,
        "precision": "fp32",
    },
}


def tiny(**overrides) -> Recipe:
    """The tiny recipe; overrides as `train__steps=3`."""
    values = {name: dict(part) if isinstance(part, dict) else part for name, part in TINY.items()}
    for key, value in overrides.items():
        section, _, field = key.partition("__")
        if field:
            values.setdefault(section, {})[field] = value
        else:
            values[section] = value
    return resolve(values, origin="test")


@dataclass
class Rows:
    tokens: Tensor
    doc_starts: Tensor


def global_batch(recipe: Recipe, step: int) -> list[Rows]:
    """The micro-batches of a step in global order: packed rows of two documents, the same on every rank and topology."""
    generator = torch.Generator().manual_seed(1000 + step)
    train = recipe.train
    tokens = torch.randint(
        0, recipe.model.vocab_size, (train.global_batch_rows, train.sequence_length), generator=generator
    )
    starts = torch.zeros(tokens.shape, dtype=torch.int32)
    starts[::2, train.sequence_length // 3 :] = train.sequence_length // 3
    size = train.micro_batch_rows
    return [Rows(tokens[at : at + size], starts[at : at + size]) for at in range(0, len(tokens), size)]


def own_rows(recipe: Recipe, parallel, step: int):
    """This data-parallel rank's micro-batches of a step, as TrainStream deals them."""
    return iter(global_batch(recipe, step)[parallel.dp_rank :: parallel.dp_size])


def train_step(model, optimizer, rows, recipe: Recipe, parallel, *, step: int, lr: float, before_update=lambda: None):
    """One optimizer step as the trainer takes it; `before_update` runs where the trainer finishes a checkpoint."""
    from ssa_megatron.train.step import StepRunner

    runner = StepRunner(model, optimizer, recipe, parallel)
    drawn = runner.draw(rows, step=step)
    losses = runner.compute(drawn)
    before_update()
    return runner.update(drawn, losses, lr=lr)


def take_steps(model, optimizer, recipe: Recipe, parallel, first: int, last: int) -> list:
    """Steps `first` up to, not including, `last`."""
    return [
        train_step(model, optimizer, own_rows(recipe, parallel, step), recipe, parallel, step=step, lr=1e-3)
        for step in range(first, last)
    ]


def build(recipe: Recipe, parallel):
    """(model, optimizer) with the recipe's initial weights."""
    from ssa_megatron.model.build import build_model
    from ssa_megatron.zero.optimizer import ShardedOptimizer

    model = build_model(recipe, parallel)
    return model, ShardedOptimizer(model, recipe, parallel)


@contextmanager
def changed_deepspeed(change: Callable[[dict], object]) -> Iterator[None]:
    """Inside, `change` is applied to DeepSpeed's generated configuration."""
    from ssa_megatron.zero import optimizer as zero

    real = zero.deepspeed_config

    def changed(recipe) -> dict:
        config = real(recipe)
        change(config)
        return config

    zero.deepspeed_config = changed
    try:
        yield
    finally:
        zero.deepspeed_config = real


def small_buckets(config: dict) -> None:
    """DeepSpeed's sizes as far below a tiny model's as its defaults are below a real one's: gradients fill several buckets, some
    are larger than one, and ZeRO-3 gathers, prefetches and releases weights. With its defaults nothing of that happens here."""
    config["zero_optimization"] |= {
        "reduce_bucket_size": 2500,
        "allgather_bucket_size": 2500,
        "stage3_param_persistence_threshold": 1000,
        "stage3_prefetch_bucket_size": 4000,
        "stage3_max_live_parameters": 8000,
    }


@contextmanager
def gradients_at_step(optimizer) -> Iterator[list]:
    """Filled on leaving with (fragment, the fp32 gradient that the inner optimizer's step found for it), for every fragment."""
    inner, seen, found = optimizer._inner, [], []
    apply = inner.step

    def look_and_step(*args, **kwargs):
        seen.extend((flat, flat.grad.detach().clone()) for group in inner.param_groups for flat in group["params"])
        return apply(*args, **kwargs)

    inner.step = look_and_step
    yield found
    inner.step = apply
    for fragment in optimizer.fragments():
        [(flat, gradient)] = [
            (f, g) for f, g in seen if f.data_ptr() <= fragment.master.data_ptr() < f.data_ptr() + 4 * f.numel()
        ]
        first = (fragment.master.data_ptr() - flat.data_ptr()) // 4
        found.append((fragment, gradient.view(-1)[first : first + fragment.numel]))


def global_tensors(pieces, recipe: Recipe, parallel) -> dict[str, Tensor]:
    """Whole tensors under global names, fp32, on every rank, from every rank's (fragment, its 1-d values)."""
    import torch.distributed as dist

    from ssa_megatron.model.shapes import global_shapes

    found = {name: torch.zeros(shape) for name, shape in global_shapes(recipe).items()}
    for fragment, values in pieces:
        named, end = fragment.named, fragment.start + fragment.numel
        if named.tied_copy or (named.replicated and parallel.tp_rank > 0):
            continue  # another rank holds the same
        for slab in named.slabs:
            first, last = max(fragment.start, slab.start), min(end, slab.start + slab.numel)
            if first < last:
                part = torch.zeros(slab.numel)
                part[first - slab.start : last - slab.start] = values[first - fragment.start : last - fragment.start]
                index = tuple(slice(o, o + n) for o, n in zip(slab.offset, slab.shape, strict=True))
                found[slab.name][index] += part.view(slab.shape)
    for tensor in found.values():
        dist.all_reduce(tensor, group=parallel.gloo_group)
    return found


def recipe_file(folder: Path, dataset: Path | None, **overrides) -> Path:
    """A recipe for the command line: three steps on the small dataset, a checkpoint after each."""
    values = {"checkpoint__interval": 1, "logging__tensorboard": False, "model__vocab_size": 400, "train__steps": 3}
    recipe = tiny(**{**values, "data__path": dataset and str(dataset), **overrides})
    path = folder / "recipe.yaml"
    path.write_text(dump_recipe(recipe))
    return path
