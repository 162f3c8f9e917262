"""What full attention does with the blocks that sparse attention would select, measured from outside the model.

Hooks on the projections of every layer take queries, keys and values of a full-mode forward; weights, entropy and dropped
mass are computed here in fp64, outputs of both streams by `kernels`, whose own selection is used. For every token and head
the error |h_full - h_sparse| stands beside the bound of the paper's Theorem 1, dropped * (max_j |v_j| + |h_sparse|). It
refuses nothing: a layer whose blocks cover the sequence drops nothing, and says so.
"""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

import ssa_kernels
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.targets import Opened
from ssa_megatron.evaluation.text import Text, sequences
from ssa_megatron.hf.bundle.positions_ssa import rotary_table, rotate

LAGS = (1, 2, 4, 8, 16, 32, 64, 128)
EDGES = tuple(10 ** (power / 2) for power in range(-8, 1))
"""Dropped mass, cut into half decades from 1e-4 to 1."""
CHUNK_ELEMENTS = 1 << 24


@dataclass
class Tokens:
    """One layer on one sequence of N tokens, H heads, K key/value heads; fp64 but for the blocks."""

    inside_hn: Tensor
    """Attention mass inside the selected blocks."""
    dropped_hn: Tensor
    """Mass outside them, summed by itself: where little is dropped, 1 - inside is rounding."""
    entropy_hn: Tensor
    """Of full attention, nats."""
    error_hn: Tensor
    bound_hn: Tensor
    norm_hn: Tensor
    """|h_full|."""
    blocks_nks: Tensor
    """Selected, own first; -1 for none."""


@torch.inference_mode()
def attention(opened: Opened, text: Text, settings: Settings) -> dict:
    """Means over tokens of sequences of the training length.

    `layers`, one entry each: `sparsity` and `entropy` a head; `theorem` (see `_theorem`); `overlap`: share of a token's
    blocks that the token LAGS before it selected too. `bins`: mean error and bound of all layers by dropped mass.
    """
    config, length = opened.model.config, opened.trained_length
    spec = ssa_kernels.BlockSpec(config.block_size, config.block_count, config.topk)
    found = sequences(opened.tokenizer, text, length, settings.sequences)
    layers: list[list[Tokens]] = [[] for _ in range(config.num_hidden_layers)]
    for tokens in found:
        with _listening(opened.model) as heard:
            rows = torch.tensor([tokens], device=opened.model.device)
            opened.model.model(rows, inference_mode="full", use_cache=False)  # without the logits
        for layer, (q, k, v) in zip(layers, heard, strict=True):
            layer.append(measure(q, k, v, spec))
    return {
        "length": length,
        "sequences": len(found),
        "block_size": spec.block_size,
        "block_count": spec.block_count,
        "lags": list(LAGS),
        "chance": _overlap_by_chance(length, spec),
        "layers": [_summary(layer, spec) for layer in layers],
        "bins": _bins([one for layer in layers for one in layer]),
    }


def measure(q_nhd: Tensor, k_nkd: Tensor, v_nkd: Tensor, spec: ssa_kernels.BlockSpec) -> Tokens:
    """One layer's queries, keys (both rotated) and values of one sequence: q `[N, H, D]`, k and v `[N, K, D]`."""
    tokens, heads, dim = q_nhd.shape
    group, size = heads // k_nkd.shape[1], spec.block_size
    q, k, v = (x[None].float() for x in (q_nhd, k_nkd, v_nkd))
    # the model's own precision decides the selection, as in training
    blocks = ssa_kernels.select_blocks(q_nhd[None], k_nkd[None], spec)[0]
    full = ssa_kernels.full_attention(q, k, v)[0].double()
    sparse = ssa_kernels.sparse_attention(q, k, v, spec, blocks=blocks[None])[0].double()

    count = -(-tokens // size)
    k_hdn = k_nkd.double().permute(1, 2, 0).repeat_interleave(group, 0)
    inside, dropped, entropy = (torch.empty(heads, tokens, dtype=torch.float64, device=q.device) for _ in range(3))
    rows = max(1, CHUNK_ELEMENTS // (heads * tokens))
    for begin in range(0, tokens, rows):
        part = slice(begin, min(begin + rows, tokens))
        score = torch.bmm(q_nhd[part].double().transpose(0, 1) * dim**-0.5, k_hdn)  # [H, rows, N]
        at = torch.arange(part.start, part.stop, device=q.device)
        score.masked_fill_(torch.arange(tokens, device=q.device) > at[:, None], -math.inf)
        log_weight = score.log_softmax(-1)
        weight = log_weight.exp()
        entropy[:, part] = -(weight * log_weight.clamp(min=-1e4)).sum(-1)  # 0 * -inf is 0 here
        mass = torch.nn.functional.pad(weight, (0, count * size - tokens)).unflatten(-1, (count, size)).sum(-1)
        chosen = torch.zeros(len(at), k_nkd.shape[1], count + 1, dtype=torch.bool, device=q.device)
        chosen.scatter_(2, torch.where(blocks[part] < 0, count, blocks[part]).long(), True)
        chosen = chosen[..., :count].transpose(0, 1).repeat_interleave(group, 0)
        inside[:, part], dropped[:, part] = (mass * chosen).sum(-1), (mass * ~chosen).sum(-1)
    largest = v_nkd.double().norm(dim=-1).cummax(0).values.T.repeat_interleave(group, 0)  # over the keys up to a token
    error, norm, reach = ((full - sparse).norm(dim=-1).T, full.norm(dim=-1).T, sparse.norm(dim=-1).T)
    return Tokens(inside, dropped, entropy, error, dropped * (largest + reach), norm, blocks)


@contextmanager
def _listening(model) -> Iterator[list[tuple[Tensor, Tensor, Tensor]]]:
    """While open, a forward of one sequence appends each layer's (q, k, v) `[N, heads, D]`, q and k rotated, to the list."""
    heard: list = []
    config, hooks = model.config, []

    def listen(layer) -> None:
        parts: dict[str, Tensor] = {}

        def take(name: str, output: Tensor) -> None:
            parts[name] = output[0].unflatten(-1, (-1, config.head_dim)).transpose(0, 1)[None]  # [1, heads, N, D]
            if len(parts) == 3:
                position = torch.arange(output.shape[1], device=output.device)[None]
                table = rotary_table(position, config, torch.promote_types(output.dtype, torch.float32))
                q, k = rotate(parts["q"], table), rotate(parts["k"], table)
                heard.append(tuple(x[0].transpose(0, 1).contiguous() for x in (q, k, parts["v"])))
                parts.clear()

        for name in ("q", "k", "v"):
            projection = getattr(layer.self_attn, f"{name}_proj")
            hooks.append(projection.register_forward_hook(lambda _, __, output, name=name: take(name, output)))

    for layer in model.model.layers:
        listen(layer)
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def _summary(sequences: list[Tokens], spec: ssa_kernels.BlockSpec) -> dict:
    return {
        "sparsity": torch.stack([one.inside_hn.mean(1) for one in sequences]).mean(0).tolist(),
        "entropy": torch.stack([one.entropy_hn.mean(1) for one in sequences]).mean(0).tolist(),
        "theorem": _theorem(sequences, spec),
        "overlap": [_mean([overlap(one.blocks_nks, lag, spec) for one in sequences]) for lag in LAGS],
    }


def _theorem(sequences: list[Tokens], spec: ssa_kernels.BlockSpec) -> dict | None:
    """Means over heads and the tokens that have blocks to drop; None where none has.

    `tightness`: mean error / mean bound. `correlation`: of error and dropped mass. `violations`: tokens and heads whose
    error exceeds the bound by more than fp32 outputs may be rounded (1e-5 of the output's norm).
    """
    first = spec.block_size * spec.block_count
    if sequences[0].error_hn.shape[1] <= first:
        return None
    dropped, error, bound, norm = (
        torch.cat([getattr(one, name)[:, first:].flatten() for one in sequences])
        for name in ("dropped_hn", "error_hn", "bound_hn", "norm_hn")
    )
    correlation = torch.corrcoef(torch.stack((dropped, error)))[0, 1].item()
    return {
        "tokens": len(error),
        "dropped": dropped.mean().item(),
        "error": error.mean().item(),
        "relative_error": (error / norm.clamp(min=1e-30)).mean().item(),
        "bound": bound.mean().item(),
        "tightness": (error.mean() / bound.mean().clamp(min=1e-300)).item(),
        "correlation": correlation if math.isfinite(correlation) else None,
        "violations": int((error > bound + 1e-5 * norm).sum()),
    }


def _bins(sequences: list[Tokens]) -> list[dict]:
    """Error and bound where the dropped mass lies in a bin (low, high], all layers, heads and tokens."""
    dropped, error, bound = (
        torch.cat([getattr(one, name).flatten() for one in sequences])
        for name in ("dropped_hn", "error_hn", "bound_hn")
    )
    found = []
    for low, high in itertools.pairwise(EDGES):
        here = (dropped > low) & (dropped <= high)
        if here.any():
            means = {"dropped": dropped[here].mean().item(), "error": error[here].mean().item()}
            found.append({**means, "bound": bound[here].mean().item(), "tokens": int(here.sum())})
    return found


def overlap(blocks_nks: Tensor, lag: int, spec: ssa_kernels.BlockSpec) -> float | None:
    """Share of a token's blocks that were also those of the token `lag` before, where both had more than enough to choose
    from; None where there is no such pair."""
    later, before = blocks_nks[lag:], blocks_nks[:-lag]
    able = before[:, 0, 0] >= spec.block_count
    if not able.any():
        return None
    later, before = later[able], before[able]
    both = ((later[..., None] == before[..., None, :]) & (later >= 0)[..., None]).any(-1).sum((1, 2))
    return (both / (later >= 0).sum((1, 2))).mean().item()


def _overlap_by_chance(length: int, spec: ssa_kernels.BlockSpec) -> float | None:
    """Expected at lag 1 if every token drew its k - 1 blocks at random."""
    owns = range(spec.block_count, -(-length // spec.block_size))
    free = spec.block_count - 1
    return _mean([(1 + free * free / own) / spec.block_count for own in owns])


def _mean(values: list[float | None]) -> float | None:
    real = [value for value in values if value is not None]
    return math.fsum(real) / len(real) if real else None
