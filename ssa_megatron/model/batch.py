"""One micro-batch, and what its forward pass carries through the layers.

`SSABatch` holds the data and never changes. `ForwardContext` adds what belongs to one forward pass: the rotary tables, the scale
of the alignment loss, and the collector that layers report to. It travels through GPTModel in the `packed_seq_params` slot, which
megatron-core hands to every attention module unchanged, also under recomputation and pipeline schedules.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.rope import rotary_table
from ssa_megatron.model.trunk import Trunk
from ssa_megatron.parallel.context_parallel import local_positions
from ssa_megatron.parallel.state import ParallelState


@dataclass(frozen=True)
class SSABatch:
    """Tensors of one micro-batch of B packed rows of N tokens, of which this rank holds n (all, without context parallelism)."""

    tokens: Tensor
    """int64 [B, n]."""
    labels: Tensor
    """int64 [B, n]: the next token; 0 where `counted` is False."""
    counted: Tensor
    """bool [B, n]: the next token belongs to the same document, so its prediction counts."""
    doc_starts: Tensor | None
    """int32 [B, N]: index in the row at which the token's own document begins; None when every row is one document, which
    lets attention take kernels without document boundaries."""
    query_index: Tensor | None
    """int32 [n]: positions in the row of this rank's tokens; None when it holds the whole row."""
    positions: Tensor
    """int [B, n]: the token's position in its own document."""
    trunk: Trunk
    """The stream that feeds the next layer."""

    @staticmethod
    def pack(
        tokens: Tensor,
        doc_starts: Tensor,
        parallel: ParallelState,
        *,
        trunk: Trunk,
    ) -> "SSABatch":
        """From one micro-batch of `ssa_pipelines.TrainStream`: tokens int64 [B, N], doc_starts int32 [B, N]."""
        one_document_per_row = not doc_starts.any()  # before the copy: on the device the host would wait for it
        device = parallel.device
        tokens = tokens.to(device, non_blocking=True)
        doc_starts = doc_starts.to(device, non_blocking=True)
        labels, counted = next_tokens(tokens, doc_starts)
        positions = torch.arange(tokens.shape[1], device=device) - doc_starts
        query_index = local_positions(tokens.shape[1], parallel, device)
        if query_index is not None:
            tokens, labels, counted, positions = (x[:, query_index] for x in (tokens, labels, counted, positions))
        return SSABatch(
            tokens=tokens,
            labels=labels,
            counted=counted,
            doc_starts=None if one_document_per_row else doc_starts,
            query_index=query_index,
            positions=positions,
            trunk=trunk,
        )


@dataclass
class Collector:
    """What the layers of this rank measure during one forward pass, in the order in which they run."""

    wants_statistics: bool = False
    """Evaluation asks each layer how much full attention its selected blocks hold."""
    alignment: list[Tensor] = field(default_factory=list)
    """One detached fp32 scalar per layer of this rank, over this rank's heads."""
    statistics: list[Tensor] = field(default_factory=list)
    """fp32 [2] per layer: sparsity and entropy (nats), mean over this rank's heads."""


@dataclass(frozen=True)
class ForwardContext:
    """One forward pass over one micro-batch."""

    batch: SSABatch
    rotary: tuple[Tensor, Tensor]
    """cos, sin, fp32 [n, B, 1, head_dim]: the tables every layer rotates by."""
    alignment_scale: float
    """Gradient given to one layer's alignment loss on this rank (see `train/objective.py`)."""
    collector: Collector

    @staticmethod
    def begin(
        batch: SSABatch, recipe: Recipe, *, alignment_scale: float = 0.0, collector: Collector | None = None
    ) -> "ForwardContext":
        """Call when the forward begins: the tables are larger than the batch, and a step may hold hundreds of batches."""
        m = recipe.model
        rotary = rotary_table(batch.positions, m.head_dim, m.rope_theta, m.rope_scaling)
        return ForwardContext(batch, rotary, alignment_scale, collector or Collector())


def next_tokens(tokens: Tensor, doc_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Labels int64 [B, N] and which of them count: a document's first token is never a target, a row's last never a source."""
    labels = torch.zeros_like(tokens)
    counted = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    counted[:, :-1] = doc_starts[:, 1:] == doc_starts[:, :-1]
    labels[:, :-1] = tokens[:, 1:]
    return labels.masked_fill_(~counted, 0), counted
