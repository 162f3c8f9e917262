"""One optimizer step: micro-batches through Megatron's schedule, gradients finished, DeepSpeed's update.

The cross-entropy is the mean over every counted token of the *global* batch, so neither the number of data-parallel ranks nor
the cut into micro-batches changes it. A non-finite loss is seen by all ranks in the same step and skips it on all of them.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.batch import SSABatch
from ssa_megatron.model.build import SSAModel
from ssa_megatron.model.mode import mode
from ssa_megatron.parallel.context import ParallelContext
from ssa_megatron.parallel.topology import micro_batches
from ssa_megatron.zero.optimizer import ShardedOptimizer


@dataclass(frozen=True)
class StepResult:
    """Equal on every rank."""

    loss: float
    """Cross-entropy, nats per counted token of the global batch."""
    alignment: float
    """Alignment loss, mean over layers and micro-batches (not weighted); 0 for kinds without one."""
    grad_norm: float
    """Global norm before clipping; inf when the step was skipped."""
    applied: bool
    counted_tokens: int
    sparse_share: float
    """Share of the global batch's micro-batches whose trunk was sparse."""


def train_step(
    model: SSAModel,
    optimizer: ShardedOptimizer,
    rows: Iterator,
    recipe: Recipe,
    context: ParallelContext,
    *,
    step: int,
    lr: float,
) -> StepResult:
    """Consume this rank's micro-batches of global step `step` from `rows` and update at rate `lr`."""
    count = micro_batches(recipe, context.world)
    model.train()
    batches, error = [], None
    try:
        batches = draw_batches(rows, recipe, context, step=step, count=count)
    except Exception as problem:  # a damaged shard is seen by one rank; all of them stop here, with its name
        error = problem
    counted = context.sum(sum(int(batch.counted.sum()) for batch in batches), error)
    ce = forward_backward(model, batches, recipe, context, counted=counted, engine=optimizer.backward_engine)
    loss, alignment, sparse = reduce_losses(ce, batches, recipe, context, counted=counted)
    if not math.isfinite(loss + alignment):
        optimizer.discard_gradients()
        return StepResult(loss, alignment, math.inf, False, int(counted), sparse)
    optimizer.finish_gradients()
    grad_norm, applied = optimizer.step(lr)
    return StepResult(loss, alignment, grad_norm, applied, int(counted), sparse)


def draw_batches(rows: Iterator, recipe: Recipe, context: ParallelContext, *, step: int, count: int) -> list[SSABatch]:
    """This rank's micro-batches of a step: micro-batch i of data-parallel rank r is number `i * data_size + r` globally."""
    attention, scale = recipe.attention, alignment_scale(recipe, count)
    batches = []
    for i in range(count):
        drawn = next(rows)
        trunk = "full"
        if attention.kind == "ssa":
            number = i * context.data_size + context.data_rank
            trunk = mode(recipe.train.seed, step, number, attention.sparse_probability)
        batches.append(
            SSABatch.pack(
                recipe, drawn.tokens, drawn.doc_starts, trunk=trunk, alignment_scale=scale, device=context.device
            )
        )
    return batches


def alignment_scale(recipe: Recipe, count: int) -> float:
    """d objective / d (one layer's loss over one rank's heads, of one micro-batch), before data-parallel averaging."""
    return recipe.attention.alignment_weight / (recipe.model.num_layers * recipe.parallel.tensor * count)


def forward_backward(
    model: SSAModel,
    batches: list[SSABatch],
    recipe: Recipe,
    context: ParallelContext,
    *,
    counted: float,
    engine: torch.nn.Module | None = None,
) -> Tensor:
    """Run Megatron's schedule over the micro-batches. Gradients accumulate; returns this rank's summed cross-entropy, fp32.

    engine: under ZeRO-2 and 3 DeepSpeed partitions gradients during backward, so every pass goes through it instead.
    """
    sums: list[Tensor] = []
    # The schedule divides by the number of micro-batches and DeepSpeed by the data-parallel size; `counted` is global.
    weight = len(batches) * context.data_size / max(counted, 1.0)

    def loss_of(batch: SSABatch, losses_bn: Tensor):
        total = (losses_bn.float() * batch.counted).sum()
        sums.append(total.detach())
        return total * weight, {}

    def forward(source: Iterator[SSABatch], model: SSAModel):
        batch = next(source)
        losses = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch)
        return losses, partial(loss_of, batch)

    if engine is not None:
        source = iter(batches)
        for _ in batches:
            losses, loss_of_batch = forward(source, engine)
            engine.backward(loss_of_batch(losses)[0] / len(batches))
        return torch.stack(sums).sum()
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(batches),
        model=model,
        num_microbatches=len(batches),
        seq_length=recipe.train.sequence_length,
        micro_batch_size=recipe.train.micro_batch_rows,
        forward_only=False,
    )
    return torch.stack(sums).sum()


def reduce_losses(
    ce: Tensor, batches: list[SSABatch], recipe: Recipe, context: ParallelContext, *, counted: float
) -> tuple[float, float, float]:
    """(cross-entropy, alignment, sparse share) of the global batch, from this rank's sums; one all-reduce, one host read."""
    alignment = torch.zeros((), dtype=torch.float64, device=context.device)
    for batch in batches:
        for loss in batch.alignment:
            alignment += loss.double()
    alignment /= recipe.model.num_layers * len(batches) * context.data_size * context.tensor_size
    sparse = sum(batch.trunk == "sparse" for batch in batches) / (len(batches) * context.data_size)
    totals = torch.stack(
        (ce.double() / max(counted, 1.0), alignment, torch.tensor(sparse, dtype=torch.float64, device=context.device))
    )
    dist.all_reduce(totals, group=context.data_group)
    dist.all_reduce(totals[1], group=context.tensor_group)  # each tensor-parallel rank aligned its own heads
    return tuple(totals.tolist())
