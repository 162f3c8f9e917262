"""Where the tokens of an exported model's rows are: padding and rotary embedding (RoPE), and the precision both keep.

A row's positions are counted from its first real token, so a left-padded row is what it is alone. It refuses attention masks
with holes. This file is copied into exported folders: torch only.
"""

import math

import torch


def wide(x):
    """fp32 for fp32 and narrower, fp64 for fp64: the precision of norms, rotations, gates and routing."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def row_starts(attention_mask):
    """[B] index of each row's first real token, or None when no row is padded on the left. Padding may also follow."""
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be [batch, tokens], got {tuple(attention_mask.shape)}")
    real = attention_mask.bool()
    seen = real.long().cumsum(-1)
    start = (seen == 0).sum(-1)
    holes = real & (seen != torch.arange(1, real.shape[1] + 1, device=real.device) - start[:, None])
    if bool(holes.any()):
        raise ValueError("attention_mask has a hole between real tokens: pad batches on the left before generating")
    start = start.clamp(max=real.shape[1] - 1)
    return start if bool(start.any()) else None


def check_one_sequence(position_ids, attention_mask):
    """Raises ValueError where positions begin anew inside a row: several sequences, as flattening collators pack them.

    Their attention would cross from one into the other and their blocks would not begin where they do, and nothing would show it.
    """
    real = torch.ones_like(position_ids, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask[:, -position_ids.shape[1] :].to(position_ids.device).bool()
    if bool(((position_ids.diff(dim=-1) < 1) & real[:, 1:] & real[:, :-1]).any()):
        raise ValueError(
            "position_ids begin anew inside a row: give each sequence a row of its own, packed ones are not kept apart"
        )


def rotary_frequencies(config, dtype, device):
    """(radians per token [D / 2], factor of cos and sin), by transformers' formulas of each RoPE type."""
    rope = config.rope_parameters
    exponent = torch.arange(0, config.head_dim, 2, dtype=dtype, device=device) / config.head_dim
    frequency = 1.0 / rope["rope_theta"] ** exponent
    if rope["rope_type"] == "linear":
        return frequency / rope["factor"], 1.0
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: long wavelengths, stretched by `factor`; 1: short, kept
        return (1 - kept) * frequency / rope["factor"] + kept * frequency, 1.0
    if rope["rope_type"] == "yarn":
        context = rope.get("original_max_position_embeddings") or config.max_position_embeddings

        def channel(turns):  # the one that turns so often in the original context
            return config.head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope["rope_theta"]))

        first, last = channel(rope.get("beta_fast") or 32), channel(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, config.head_dim - 1)
        index = torch.arange(config.head_dim // 2, dtype=dtype, device=device)
        stretched = ((index - first) / ((last - first) or 0.001)).clamp(0, 1)
        factor = rope["factor"]
        size = rope.get("attention_factor") or (0.1 * math.log(factor) + 1 if factor > 1 else 1.0)
        return stretched * frequency / factor + (1 - stretched) * frequency, size
    return frequency, 1.0


def rotary_table(position_bt, config, dtype):
    """cos and sin [B, 1, T, D] of the half-rotation form, computed in `dtype` (fp32 or wider)."""
    frequency, size = rotary_frequencies(config, dtype, position_bt.device)
    angle = position_bt.to(dtype)[..., None] * frequency
    angle = torch.cat((angle, angle), dim=-1)[:, None]
    return angle.cos() * size, angle.sin() * size


def rotate(x, table):
    """x [B, heads, T, D]."""
    cos, sin = table
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)
