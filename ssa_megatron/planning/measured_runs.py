"""What the plan predicts, measured: a few real steps on random tokens, memory peaks of each phase, seconds per step.

`python -m ssa_megatron.planning.measured_runs RECIPE [section.field=value ...] [--document N]`, alone or under torchrun; needs
no data and writes nothing. Rank 0 prints one JSON line, bytes as the allocator counts them (the CUDA context is not in it);
the lines of measured-h100.jsonl were made so, and a test holds the plan to them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ssa_megatron.config import Recipe, load_recipe
from ssa_megatron.model.build import build_model
from ssa_megatron.parallel import device
from ssa_megatron.parallel.state import finalize, initialize
from ssa_megatron.train.step import StepRunner
from ssa_megatron.zero.optimizer import ShardedOptimizer


@dataclass
class Rows:
    """One micro-batch, as `ssa_pipelines.TrainStream` gives it."""

    tokens: torch.Tensor
    doc_starts: torch.Tensor


def random_rows(recipe: Recipe, document: int) -> Iterator[Rows]:
    """Endless micro-batches of random tokens in documents of `document` tokens."""
    train = recipe.train
    shape = (train.micro_batch_rows, train.sequence_length)
    generator = torch.Generator().manual_seed(0)
    at = torch.arange(train.sequence_length, dtype=torch.int32)
    starts = (at - at % document).expand(shape).contiguous()
    while True:
        yield Rows(torch.randint(0, recipe.model.vocab_size, shape, generator=generator), starts)


def measure(recipe: Recipe, document: int, steps: int = 5) -> dict:
    """Bytes and seconds of `steps` steps of the real trainer on this rank."""
    parallel = initialize(recipe)
    found: dict = {"world": parallel.world_size, "document": document}
    on_gpu = parallel.device.type == "cuda"

    def peak() -> int:
        value = device.peak_memory()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        return value

    model = build_model(recipe, parallel)
    optimizer = ShardedOptimizer(model, recipe, parallel)
    found["build_peak"] = peak()
    found["resident"] = torch.cuda.memory_allocated() if on_gpu else None
    real_step = optimizer.step

    def watched_step(lr: float):
        found["backward_peak"] = peak()
        found["after_backward"] = torch.cuda.memory_allocated() if on_gpu else None
        result = real_step(lr)
        found["step_peak"] = peak()
        return result

    optimizer.step = watched_step  # type: ignore[method-assign]
    runner, rows, seconds = StepRunner(model, optimizer, recipe, parallel), random_rows(recipe, document), []
    for step in range(steps):
        began = time.monotonic()
        result = runner.run(rows, step=step, lr=1e-4)
        seconds.append(time.monotonic() - began)
    if on_gpu:
        free, total = torch.cuda.mem_get_info()
        found["outside_allocator"] = total - free - torch.cuda.memory_reserved()
        found["reserved"] = torch.cuda.memory_reserved()
    found |= {"seconds": round(statistics.median(seconds[2:]), 4), "loss": round(result.loss, 4)}
    finalize()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--document", type=int, default=1024, help="tokens of a document; the row length for one a row")
    arguments = parser.parse_intermixed_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    found = measure(recipe, arguments.document)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"recipe": recipe.name, "overrides": arguments.overrides, **found}), flush=True)


if __name__ == "__main__":
    main()
