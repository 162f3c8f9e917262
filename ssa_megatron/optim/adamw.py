"""`adamw`: Adam with decoupled weight decay (arXiv 1711.05101), as torch implements it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssa_megatron.config.variants import OPTIMIZERS
from ssa_megatron.optim.base import OptimizerKind

if TYPE_CHECKING:
    import torch


@OPTIMIZERS.register("adamw")
class AdamW(OptimizerKind):
    state = ("exp_avg", "exp_avg_sq")

    def build(self, parameters: "Sequence[torch.nn.Parameter]", *, fused: bool) -> "torch.optim.Optimizer":
        import torch

        s = self.settings
        return torch.optim.AdamW(self.groups(parameters), lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, fused=fused)
