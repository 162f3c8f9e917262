"""What one micro-batch tells every layer: document boundaries, rotary table, trunk, and where to leave the alignment loss.

It travels through GPTModel in the `packed_seq_params` slot, which megatron-core hands to every attention module unchanged,
also under recomputation and pipeline schedules. One object belongs to one micro-batch and holds no other state.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.rope import rotary_table
from ssa_megatron.model.trunk import Trunk
from ssa_megatron.parallel.context_parallel import local_positions
from ssa_megatron.parallel.state import ParallelState


@dataclass
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
    lets attention take kernels that know no boundaries."""
    query_index: Tensor | None
    """int32 [n]: the places in the row of this rank's tokens; None when it holds the whole row."""
    positions: Tensor
    """int [B, n]: the token's place in its own document."""
    trunk: Trunk
    alignment_scale: float
    """Gradient given to one layer's alignment loss on this rank (see `train/step.py`)."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos, sin, fp32 [n, B, 1, head_dim]; see `with_rotary`."""
    alignment: list[Tensor] = field(default_factory=list)
    """One detached fp32 scalar a layer of this rank, over this rank's heads."""
    wants_statistics: bool = False
    """Evaluation asks each layer how much full attention its selected blocks hold."""
    statistics: list[Tensor] = field(default_factory=list)
    """fp32 [2] a layer: sparsity and entropy (nats), mean over this rank's heads."""

    @staticmethod
    def pack(
        recipe: Recipe,
        tokens: Tensor,
        doc_starts: Tensor,
        parallel: ParallelState,
        *,
        trunk: Trunk,
        alignment_scale: float,
    ) -> "SSABatch":
        """From one micro-batch of `ssa_pipelines.TrainStream`: tokens int64 [B, N], doc_starts int32 [B, N]."""
        one_document_a_row = not doc_starts.any()  # asked before the copy: on the device it would wait for it
        device = parallel.device
        tokens = tokens.to(device, non_blocking=True)
        doc_starts = doc_starts.to(device, non_blocking=True)
        labels, counted = next_tokens(tokens, doc_starts)
        positions = torch.arange(tokens.shape[1], device=device) - doc_starts
        places = local_positions(tokens.shape[1], parallel, device)
        if places is not None:
            tokens, labels, counted, positions = (x[:, places] for x in (tokens, labels, counted, positions))
        return SSABatch(
            tokens=tokens,
            labels=labels,
            counted=counted,
            doc_starts=None if one_document_a_row else doc_starts,
            query_index=places,
            positions=positions,
            trunk=trunk,
            alignment_scale=alignment_scale,
        )

    def with_rotary(self, recipe: Recipe) -> "SSABatch":
        """The same batch, with the tables every layer rotates by. Made when its forward begins: they are larger than the batch,
        and a step may hold hundreds of batches."""
        m = recipe.model
        return replace(self, rotary=rotary_table(self.positions, m.head_dim, m.rope_theta, m.rope_scaling))


def next_tokens(tokens: Tensor, doc_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Labels int64 [B, N] and which of them count: a document's first token is never a target, a row's last never a source."""
    labels = torch.zeros_like(tokens)
    counted = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    counted[:, :-1] = doc_starts[:, 1:] == doc_starts[:, :-1]
    labels[:, :-1] = tokens[:, 1:]
    return labels.masked_fill_(~counted, 0), counted
