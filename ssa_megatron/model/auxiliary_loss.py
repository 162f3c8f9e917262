"""Puts a loss that a layer computes into the graph, out of the pipeline schedule's sight.

`attach_auxiliary_loss` is an identity on the layer's output whose backward gives the loss a constant gradient. It works under
every pipeline schedule and under recomputation; megatron-core carries its MoE auxiliary losses in the same way.
"""

import torch
from torch import Tensor


class _AttachAuxiliaryLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, output: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.loss_dtype = scale, loss.dtype
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, torch.full((), ctx.scale, dtype=ctx.loss_dtype, device=grad_output.device), None


def attach_auxiliary_loss(output: Tensor, loss: Tensor, scale: float) -> Tensor:
    """`output` unchanged; backward through it adds `scale * d loss`."""
    return _AttachAuxiliaryLoss.apply(output, loss, scale)
