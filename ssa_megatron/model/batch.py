"""What one micro-batch tells every layer: document boundaries, rotary table, trunk, and where to leave the alignment loss.

It travels through GPTModel in the `packed_seq_params` slot, which megatron-core hands to every attention module unchanged,
also under recomputation and pipeline schedules. One object belongs to one micro-batch and holds no other state.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.mode import Trunk
from ssa_megatron.model.rope import rotary_table


@dataclass
class SSABatch:
    """Tensors of one micro-batch of B packed rows of N tokens."""

    tokens: Tensor
    """int64 [B, N]."""
    labels: Tensor
    """int64 [B, N]: the next token; 0 where `counted` is False."""
    counted: Tensor
    """bool [B, N]: the next token belongs to the same document, so its prediction counts."""
    doc_starts: Tensor | None
    """int32 [B, N]: index in the row at which the token's own document begins; None when every row is one document, which
    lets attention take kernels that know no boundaries."""
    rotary: tuple[Tensor, Tensor]
    """cos, sin, fp32 [N, B, 1, head_dim]; positions restart at each document."""
    trunk: Trunk
    alignment_scale: float
    """Gradient given to one layer's alignment loss on this rank (see `train/step.py`)."""
    alignment: list[Tensor] = field(default_factory=list)
    """One detached fp32 scalar a layer of this rank, over this rank's heads."""
    wants_statistics: bool = False
    """Evaluation asks each layer how much full attention its selected blocks hold."""
    statistics: list[Tensor] = field(default_factory=list)
    """fp32 [2] a layer: sparsity and entropy (nats), mean over this rank's heads."""

    @staticmethod
    def pack(
        recipe: Recipe, tokens: Tensor, doc_starts: Tensor, *, trunk: Trunk, alignment_scale: float, device
    ) -> "SSABatch":
        """From one micro-batch of `pipelines.TrainStream`: tokens int64 [B, N], doc_starts int32 [B, N]."""
        one_document_a_row = not doc_starts.any()  # asked before the copy: on the device it would wait for it
        tokens = tokens.to(device, non_blocking=True)
        doc_starts = doc_starts.to(device, non_blocking=True)
        labels, counted = next_tokens(tokens, doc_starts)
        positions = torch.arange(tokens.shape[1], device=device) - doc_starts
        model = recipe.model
        return SSABatch(
            tokens=tokens,
            labels=labels,
            counted=counted,
            doc_starts=None if one_document_a_row else doc_starts,
            rotary=rotary_table(positions, model.head_dim, model.rope_theta, model.rope_scaling),
            trunk=trunk,
            alignment_scale=alignment_scale,
        )


def next_tokens(tokens: Tensor, doc_starts: Tensor) -> tuple[Tensor, Tensor]:
    """Labels int64 [B, N] and which of them count: a document's first token is never a target, a row's last never a source."""
    labels = torch.zeros_like(tokens)
    counted = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    counted[:, :-1] = doc_starts[:, 1:] == doc_starts[:, :-1]
    labels[:, :-1] = tokens[:, 1:]
    return labels.masked_fill_(~counted, 0), counted
