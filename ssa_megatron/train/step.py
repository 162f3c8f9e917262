"""One optimizer step: micro-batches through Megatron's schedule, gradients finished, DeepSpeed's update.

The cross-entropy is the mean over every counted token of the *global* batch, so neither the number of data-parallel ranks nor
the cut into micro-batches changes it. A non-finite loss is seen by all ranks in the same step and skips it on all of them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.batch import SSABatch
from ssa_megatron.model.build import SSAChunk, SSAModel
from ssa_megatron.model.trunk import mode
from ssa_megatron.parallel.state import ParallelState
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
    parallel: ParallelState,
    *,
    step: int,
    lr: float,
    before_update: Callable[[], object] = lambda: None,
    phase: Callable[[str], object] = lambda name: None,
    drawing: Callable[[], AbstractContextManager] = nullcontext,
) -> StepResult:
    """Consume this rank's micro-batches of global step `step` from `rows` and update at rate `lr`.

    phase: told what begins, on every rank. drawing: what the wait for data runs inside; a BaseException that it raises on one
    rank is raised on all, before anything has changed.
    before_update: called on every rank between backward and update; until it returns, weights, masters and moments are still
    those of the step before (a checkpoint of which may be on its way).
    """
    count = micro_batches(recipe, parallel.world_size)
    model.train()
    batches, error = [], None
    phase("data")
    try:
        with drawing():
            batches = draw_batches(rows, recipe, parallel, step=step, count=count)
    except BaseException as problem:  # a damaged shard is seen by one rank; all of them stop here, with its name
        error = problem
    phase("compute")
    counted = parallel.all_reduce_sum(sum(int(batch.counted.sum()) for batch in batches), error)
    ce = forward_backward(model, batches, recipe, parallel, counted=counted, engine=optimizer.backward_engine)
    loss, alignment, sparse = reduce_losses(ce, batches, recipe, parallel, counted=counted)
    phase("save")
    before_update()
    phase("update")
    if not math.isfinite(loss + alignment):
        optimizer.discard_gradients()
        return StepResult(loss, alignment, math.inf, False, int(counted), sparse)
    optimizer.finish_gradients()
    grad_norm, applied = optimizer.step(lr)
    return StepResult(loss, alignment, grad_norm, applied, int(counted), sparse)


def draw_batches(rows: Iterator, recipe: Recipe, parallel: ParallelState, *, step: int, count: int) -> list[SSABatch]:
    """This rank's micro-batches of a step: micro-batch i of data-parallel rank r is number `i * dp_size + r` globally."""
    attention, scale = recipe.attention, alignment_scale(recipe, count)
    batches = []
    for i in range(count):
        drawn = next(rows)
        trunk = "full"
        if attention.kind == "ssa":
            number = i * parallel.dp_size + parallel.dp_rank
            trunk = mode(recipe.train.seed, step, number, attention.sparse_probability)
        batches.append(
            SSABatch.pack(recipe, drawn.tokens, drawn.doc_starts, parallel, trunk=trunk, alignment_scale=scale)
        )
    return batches


def alignment_scale(recipe: Recipe, count: int) -> float:
    """d objective / d (one layer's loss over one rank's heads, of one micro-batch), before data-parallel averaging."""
    return recipe.attention.alignment_weight / (recipe.model.num_layers * recipe.parallel.tensor * count)


def forward_backward(
    model: SSAModel,
    batches: list[SSABatch],
    recipe: Recipe,
    parallel: ParallelState,
    *,
    counted: float,
    forward_only: bool = False,
    engine: torch.nn.Module | None = None,
) -> Tensor:
    """Run Megatron's schedule over the micro-batches; gradients accumulate unless `forward_only`.

    engine: under ZeRO-2 and 3 DeepSpeed partitions gradients during backward, so every pass goes through it instead.
    Returns the summed cross-entropy of this rank's tokens, fp32; 0 on pipeline stages before the last.
    """
    sums: list[Tensor] = []
    # The schedule multiplies by the context-parallel size and divides by the number of micro-batches, DeepSpeed divides by data-
    # times context-parallel size; `counted` is global.
    weight = len(batches) * parallel.dp_size / max(counted, 1.0)

    def loss_of(batch: SSABatch, losses_bn: Tensor):
        total = (losses_bn.float() * batch.counted).sum()
        sums.append(total.detach())
        return total * weight, {}

    def forward(source: Iterator[SSABatch], chunk: SSAChunk):
        batch = next(source).with_rotary(recipe)
        losses = chunk(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch)
        return losses, partial(loss_of, batch)  # which the schedule calls on the last stage

    if engine is not None:
        source = iter(batches)
        for _ in batches:
            losses, loss_of_batch = forward(source, engine)
            engine.backward(loss_of_batch(losses)[0] * (parallel.cp_size / len(batches)))
        return torch.stack(sums).sum()
    interleaved = len(model.chunks) > 1
    get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in model.chunks] if interleaved else iter(batches),
        model=list(model.chunks) if interleaved else model.chunks[0],
        num_microbatches=len(batches),
        seq_length=recipe.train.sequence_length,
        micro_batch_size=batches[0].tokens.shape[0],
        forward_only=forward_only,
    )
    return torch.stack(sums).sum() if sums else torch.zeros((), device=parallel.device)


def reduce_losses(
    ce: Tensor, batches: list[SSABatch], recipe: Recipe, parallel: ParallelState, *, counted: float
) -> tuple[float, float, float]:
    """(cross-entropy, alignment, sparse share) of the global batch, from this rank's sums; one all-reduce, one host read."""
    alignment = torch.zeros((), dtype=torch.float64, device=parallel.device)
    for batch in batches:
        for loss in batch.alignment:
            alignment += loss.double()
    # every rank aligned its own layers, heads and tokens; tensor-parallel ranks of the last stage hold the same cross-entropy
    alignment /= recipe.model.num_layers * len(batches) * parallel.dp_cp_size * parallel.tp_size
    sparse = sum(batch.trunk == "sparse" for batch in batches) / (len(batches) * parallel.world_size)
    ce = ce.double() / (max(counted, 1.0) * parallel.tp_size)
    totals = torch.stack((ce, alignment, torch.tensor(sparse, dtype=torch.float64, device=parallel.device)))
    dist.all_reduce(totals)
    return tuple(totals.tolist())
