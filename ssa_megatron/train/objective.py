"""The training objective, under every way to cut a step over ranks and micro-batches.

    L = CE + alpha * mean over layers and micro-batches of L_layer            (docs/method.md, "The training objective")

CE is the mean over every counted token of the *global* batch, so neither the number of data-parallel ranks nor the number of
micro-batches changes it. `L_layer` is a layer's alignment loss, the mean over all heads and tokens. The factors below undo what
megatron-core's schedule and DeepSpeed multiply and divide by on the way; nothing else in this package scales a loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.parallel.state import ParallelState


@dataclass(frozen=True)
class Losses:
    """Of the global batch; equal on every rank."""

    cross_entropy: float
    """Nats per counted token."""
    alignment: float
    """Mean over layers and micro-batches, not weighted; 0 for kinds without one."""
    sparse_share: float
    """Share of the micro-batches whose trunk was sparse."""


@dataclass(frozen=True)
class Objective:
    """The factors for `micro_batches` micro-batches per rank and `counted` tokens in the global batch."""

    recipe: Recipe
    parallel: ParallelState
    micro_batches: int
    counted: float

    @property
    def cross_entropy_scale(self) -> float:
        """On a micro-batch's summed cross-entropy, before the schedule.

        The schedule multiplies by cp_size and divides by the number of micro-batches; DeepSpeed then divides by
        dp_size * cp_size. What is left is 1 / counted.
        """
        return self.micro_batches * self.parallel.dp_size / max(self.counted, 1.0)

    @property
    def schedule_scale(self) -> float:
        """What megatron-core's schedule multiplies by. ZeRO-2 and 3 run without a schedule and apply it themselves."""
        return self.parallel.cp_size / self.micro_batches

    @property
    def alignment_scale(self) -> float:
        """The gradient of one layer's loss over this rank's heads, for one micro-batch.

        alpha over layers, micro-batches and tensor-parallel ranks, which hold a share of the heads each. DeepSpeed's division by
        dp_size * cp_size gives the mean over the ranks that hold other tokens.
        """
        weight = self.recipe.attention.alignment_weight if kind_of(self.recipe).aligned else 0.0
        return weight / (self.recipe.model.num_layers * self.parallel.tp_size * self.micro_batches)

    def shares(self, cross_entropy: Tensor, alignment: list[Tensor], sparse: int) -> Tensor:
        """What this rank adds to the global batch's `Losses`: fp64 [3], to be summed over all ranks.

        cross_entropy: fp32, summed over this rank's tokens; 0 on pipeline stages before the last. alignment: every layer's loss
        in every micro-batch. sparse: micro-batches with a sparse trunk.
        """
        p = self.parallel
        aligned = torch.zeros((), dtype=torch.float64, device=p.device)
        for loss in alignment:
            aligned += loss.double()
        # every rank aligned its own layers, heads and tokens; tp ranks of the last stage hold the same cross-entropy
        aligned /= self.recipe.model.num_layers * self.micro_batches * p.dp_cp_size * p.tp_size
        mean = cross_entropy.double() / (max(self.counted, 1.0) * p.tp_size)
        share = sparse / (self.micro_batches * p.world_size)
        return torch.stack((mean, aligned, torch.tensor(share, dtype=torch.float64, device=p.device)))
