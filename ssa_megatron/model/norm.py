"""RMSNorm for every precision and for sequence parallelism, which the stock torch-only norm of megatron-core refuses.

Statistics are fp32. Under sequence parallelism each rank sees its own tokens only, so the optimizer sums the weight's gradient
over the tensor-parallel ranks before its step.
"""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`x / rms(x) * weight` over the last dimension; megatron-core's norm constructor signature."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * self.weight.float()).to(x.dtype)
