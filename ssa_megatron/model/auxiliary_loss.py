"""The alignment loss on its way into the graph.

The loss of a layer is born deep inside the model, where no schedule looks for losses. It is hung on the layer's output by a
function that passes the output through and, in backward, gives the loss a constant gradient; that works under every pipeline
schedule and under recomputation (method.md, "The training objective"; the same device carries MoE auxiliary losses).
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
