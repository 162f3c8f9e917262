"""fp32 accumulation of weight gradients inside the matrix product that makes them.

Under bf16 training with ZeRO-1, DeepSpeed keeps a flat fp32 gradient buffer. Stock, each micro-batch writes a bf16 gradient,
casts it and adds it. Here the product adds to the buffer itself. It needs CUDA and serves models without tensor parallelism.
"""

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, buffer: "GradientBuffer") -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.buffer = buffer
        return torch.matmul(x, weight.t())

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        ctx.buffer.add_product(dy.flatten(0, -2), x.flatten(0, -2))
        return dy.matmul(weight), None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, buffer: "GradientBuffer") -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.buffer = buffer
        return torch.nn.functional.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        ctx.buffer.add_rows(*ctx.saved_tensors, dy)
        return None, None, None


class GradientBuffer:
    """One weight's fp32 gradient inside DeepSpeed's flat buffer."""

    def __init__(self, weight: Any, optimizer, group: int, index: int):
        """weight: number `index` of parameter group `group` of `optimizer`, DeepSpeed's BF16_Optimizer."""
        self._weight, self._optimizer, self._place = weight, optimizer, (group, index)

    def add_product(self, dy: Tensor, x: Tensor) -> None:
        """Add `dy.T @ x`, bf16 `[T, out]` and `[T, in]`."""
        gradient = self._gradient()
        torch.addmm(gradient, dy.t(), x, out_dtype=torch.float32, out=gradient)

    def add_rows(self, tokens: Tensor, dy: Tensor) -> None:
        """Add `dy[t]`, bf16 `[..., H]`, to row `tokens[t]`, int64 `[...]`; in a fixed order."""
        self._gradient().index_put_((tokens,), dy.float(), accumulate=True)

    def _gradient(self) -> Tensor:
        group, index = self._place
        flat = self._optimizer.fp32_groups_gradients[group][index]
        self._weight._hp_grad = flat  # as DeepSpeed's own hook does
        self._optimizer.fp32_groups_has_gradients[group][index] = True
        return flat.view(self._weight.shape)


def accumulate_in_products(model: torch.nn.Module, optimizer) -> None:
    """Make every linear layer of `model` add its weight's gradient to `optimizer`'s (BF16_Optimizer) fp32 buffer."""
    buffers = {
        id(weight): GradientBuffer(weight, optimizer, i, j)
        for i, group in enumerate(optimizer.bf16_groups)
        for j, weight in enumerate(group)
    }

    def product(input: Tensor, weight: Tensor, *_, **__) -> Tensor:
        return _Linear.apply(input, weight, buffers[id(weight)])

    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module._forward_impl = product
        if isinstance(module, VocabParallelEmbedding):
            module.forward = lambda tokens, weight=module.weight: _Lookup.apply(tokens, weight, buffers[id(weight)])
