"""What the kernels ask of autograd, autocast and the current device, whichever backend runs.

Every stream computes in the types it was given, on the tensors' own device, and has first derivatives only: a second one is
refused instead of being taken for zero. What only the backward pass reads may not change before it.
"""

import functools
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

SECOND = (
    "kernels: the gradients of attention have no gradient of their own (create_graph=True was asked for, and then a second "
    "derivative); for small inputs ssa_kernels.reference.oracle is plain PyTorch and has every derivative"
)


def plain(x: Tensor) -> ExitStack:
    """A context without autocast, which would round products to half precision and change selections, and with x's
    device current, where Triton launches."""
    stack = ExitStack()
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        stack.enter_context(torch.cuda.device(x.device))
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack


def unchanged(*tensors: Tensor | None) -> list[Tensor]:
    """Those of the tensors that `save_for_backward` takes: saved beside the others, autograd refuses a backward pass before
    which one was written to in place (a buffer of document starts that the next micro-batch reuses)."""
    return [x for x in tensors if x is not None and not x.is_inference()]


class _FirstOnly(torch.autograd.Function):
    """A gradient as it is, whose own gradient, asked for through any of `sources`, is refused."""

    @staticmethod
    def forward(ctx, gradient, *sources):
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError(SECOND)


def first_order(backward: Callable) -> Callable:
    """Decorates an `autograd.Function`'s backward, which then runs plainly, without a graph, and refuses to be differentiated.

    PyTorch's `once_differentiable` does so only where the upstream gradient requires one itself: for a sum it does not, and
    the second derivative was zero in silence.
    """

    @functools.wraps(backward)
    def run(ctx, *upstream):
        with torch.no_grad(), plain(upstream[0]):
            gradients = backward(ctx, *upstream)
        if not torch.is_grad_enabled():  # as it is unless create_graph was asked for
            return gradients
        sources = [x for x in (*upstream, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(_FirstOnly.apply(x, *sources) if isinstance(x, Tensor) else x for x in gradients)

    return run
