"""Rotary position embedding, half-rotation form over the whole head (docs/method.md, step 1; Llama).

Positions come with the batch and restart at each packed document, so a packed document is rotated bit for bit as it is alone.
Tables and the rotation are fp32 whatever the model's precision.
"""

import math

import torch
from torch import Tensor

from ssa_megatron.config.sections import RopeScaling


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device) -> Tensor:
    """fp32 `[head_dim / 2]`, radians per token; with Llama-3 scaling, long wavelengths are stretched by `factor`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    context = scaling.original_max_position_embeddings
    smooth = (context / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0, 1)  # 0: as long as the context or longer, stretched; 1: short, kept
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotary_table(
    positions_bn: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None
) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 `[N, B, 1, head_dim]`, for integer positions `[B, N]`; Megatron's sequence-first layout."""
    frequencies = inverse_frequencies(head_dim, theta, scaling, positions_bn.device)
    angles = positions_bn.t().unsqueeze(-1).float() * frequencies  # [N, B, head_dim / 2]
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def apply_rotary(x_nbhd: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `[N, B, heads, head_dim]`; computed in fp32, returned in x's dtype."""
    cos, sin = table
    half = x_nbhd.shape[-1] // 2
    rotated = torch.cat((-x_nbhd[..., half:], x_nbhd[..., :half]), dim=-1)
    return (x_nbhd * cos + rotated * sin).to(x_nbhd.dtype)
