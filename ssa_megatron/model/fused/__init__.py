"""Pointwise work of a step as fused Triton kernels (`train.pointwise=fused`), each next to its plain PyTorch reference.

Every module has `reference` and one function of the same arguments that runs the kernel. Both compute in fp32.
The kernels need CUDA, or Triton's interpreter on a CPU.
"""

import os

from ssa_megatron.config import Recipe
from ssa_megatron.parallel import device


def wanted(recipe: Recipe) -> bool:
    """Whether this process runs the fused kernels."""
    able = device.on_gpu() or os.environ.get("TRITON_INTERPRET") == "1"
    return recipe.train.pointwise == "fused" and able
