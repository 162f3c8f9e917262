"""One optimizer step in three parts: draw the micro-batches, run them forward and backward, update the weights.

A non-finite loss is seen by all ranks in the same step and skips it on all of them. The trainer calls the parts one by one,
because it reports a phase and finishes a checkpoint between them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.batch import Collector, ForwardContext, SSABatch
from ssa_megatron.model.build import SSAModel
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.model.trunk import draw_trunk
from ssa_megatron.parallel.state import ParallelState
from ssa_megatron.parallel.topology import micro_batches
from ssa_megatron.train.objective import Losses, Objective
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


@dataclass(frozen=True)
class Drawn:
    """This rank's micro-batches of one step."""

    batches: list[SSABatch]
    counted: float
    """Counted tokens of the global batch, over all ranks."""


class StepRunner:
    """Takes optimizer steps with one model and its optimizer; every rank calls the same methods in the same order."""

    def __init__(self, model: SSAModel, optimizer: ShardedOptimizer, recipe: Recipe, parallel: ParallelState):
        self.model, self.optimizer, self.recipe, self.parallel = model, optimizer, recipe, parallel

    def run(self, rows: Iterator, *, step: int, lr: float) -> StepResult:
        """All three parts, for callers that do nothing in between."""
        drawn = self.draw(rows, step=step)
        return self.update(drawn, self.compute(drawn), lr=lr)

    def draw(self, rows: Iterator, *, step: int, waiting: AbstractContextManager | None = None) -> Drawn:
        """Consume this rank's micro-batches of global step `step` from `rows`.

        waiting: the wait for data runs inside it. Any BaseException of one rank is raised on all, before gradients or weights
        change; the stream may have advanced.
        """
        batches: list[SSABatch] = []
        error = None
        try:
            with waiting or nullcontext():
                batches = draw_batches(rows, self.recipe, self.parallel, step=step)
        except BaseException as problem:  # a damaged shard is seen by one rank; all of them stop here and report it
            error = problem
        return Drawn(batches, self.parallel.all_reduce_sum(sum(int(batch.counted.sum()) for batch in batches), error))

    def compute(self, drawn: Drawn) -> Losses:
        """Forward and backward; gradients accumulate."""
        self.model.train()
        return forward_backward(
            self.model, drawn, self.recipe, self.parallel, engine=self.optimizer.backward_engine
        ).losses()

    def update(self, drawn: Drawn, losses: Losses, *, lr: float) -> StepResult:
        """Reduce, clip and apply the gradients at rate `lr`, or skip the step when a loss or a gradient is not finite."""
        norm, applied = math.inf, False
        if math.isfinite(losses.cross_entropy + losses.alignment):
            self.optimizer.finish_gradients()
            norm, applied = self.optimizer.step(lr)
        else:
            self.optimizer.discard_gradients()
        counted = int(drawn.counted)
        return StepResult(losses.cross_entropy, losses.alignment, norm, applied, counted, losses.sparse_share)


def draw_batches(rows: Iterator, recipe: Recipe, parallel: ParallelState, *, step: int) -> list[SSABatch]:
    """This rank's micro-batches of a step: micro-batch i of data-parallel rank r is number `i * dp_size + r` globally."""
    trunks, probability = kind_of(recipe).trunks, recipe.attention.sparse_probability
    batches = []
    for i in range(micro_batches(recipe, parallel.world_size)):
        drawn = next(rows)
        number = i * parallel.dp_size + parallel.dp_rank
        trunk = draw_trunk(recipe.train.seed, step, number, probability) if len(trunks) > 1 else trunks[0]
        batches.append(SSABatch.pack(drawn.tokens, drawn.doc_starts, parallel, trunk=trunk))
    return batches


@dataclass(frozen=True)
class Pass:
    """What a forward (and backward) pass over a rank's micro-batches left on this rank."""

    objective: Objective
    batches: list[SSABatch]
    cross_entropy: Tensor
    """fp32, summed over this rank's tokens; 0 on pipeline stages before the last."""
    collectors: list[Collector]
    """One per micro-batch."""

    def losses(self) -> Losses:
        """Of the global batch; one all_reduce, one host read."""
        alignment = [loss for collector in self.collectors for loss in collector.alignment]
        sparse = sum(batch.trunk == "sparse" for batch in self.batches)
        totals = self.objective.shares(self.cross_entropy, alignment, sparse)
        dist.all_reduce(totals)
        return Losses(*totals.tolist())

    def statistics(self) -> list[float]:
        """Sparsity and entropy (nats), means over tokens, heads and layers; every rank measured its own."""
        p = self.objective.parallel
        total = torch.stack([one for collector in self.collectors for one in collector.statistics]).double().sum(0)
        total /= self.objective.recipe.model.num_layers * len(self.batches) * p.dp_cp_size * p.tp_size
        dist.all_reduce(total)
        return total.tolist()


def forward_backward(
    model: SSAModel,
    drawn: Drawn,
    recipe: Recipe,
    parallel: ParallelState,
    *,
    forward_only: bool = False,
    wants_statistics: bool = False,
    engine: Any = None,
) -> Pass:
    """Run Megatron's schedule over the micro-batches; gradients accumulate unless `forward_only`.

    engine: DeepSpeed's. Under ZeRO-2 and 3 it partitions gradients during backward, so training passes go through it.
    """
    batches = drawn.batches
    objective = Objective(recipe, parallel, len(batches), drawn.counted)
    collectors = [Collector(wants_statistics) for _ in batches]
    sums: list[Tensor] = []

    def loss_of(batch: SSABatch, losses_bn: Tensor):
        total = (losses_bn.float() * batch.counted).sum()
        sums.append(total.detach())
        return total * objective.cross_entropy_scale, {}

    def forward(source: Iterator[tuple[SSABatch, Collector]], chunk: Callable[..., Tensor]):
        batch, collector = next(source)
        scale = 0.0 if forward_only else objective.alignment_scale
        context = ForwardContext.begin(batch, recipe, alignment_scale=scale, collector=collector)
        losses = chunk(batch.tokens, None, None, labels=batch.labels, packed_seq_params=context)
        return losses, partial(loss_of, batch)  # which the schedule calls on the last stage

    def source() -> Iterator[tuple[SSABatch, Collector]]:
        return iter(list(zip(batches, collectors, strict=True)))

    if engine is not None:
        rest = source()
        for _ in batches:
            losses, loss_of_batch = forward(rest, engine)
            engine.backward(loss_of_batch(losses)[0] * objective.schedule_scale)
    else:
        interleaved = len(model.chunks) > 1
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[source() for _ in model.chunks] if interleaved else source(),
            model=list(model.chunks) if interleaved else model.chunks[0],
            num_microbatches=len(batches),
            seq_length=recipe.train.sequence_length,
            micro_batch_size=batches[0].tokens.shape[0],
            forward_only=forward_only,
        )
    total = torch.stack(sums).sum() if sums else torch.zeros((), device=parallel.device)
    return Pass(objective, batches, total, collectors)
