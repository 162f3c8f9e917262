"""Nats per token of held-out text: against the block budget, and by position beyond the training length.

Differences between settings are paired: the same tokens are scored each time, and the standard error is that of the
difference over pieces of text. It changes nothing of the model.
"""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.targets import Opened, not_finite
from ssa_megatron.evaluation.text import Text, pieces, sequences
from ssa_megatron.hf import bare


def quality_against_budget(opened: Opened, text: Text, settings: Settings) -> dict:
    """Full mode, then sparse mode at each budget, on documents cut to the training length.

    `rows`: mode, block_count (None in full mode), nats, perplexity, bits_per_byte, gap (nats more than full mode),
    gap_error (its standard error). Pieces of a document are scored apart, as rows of training are.
    """
    length, size = opened.trained_length, opened.model.config.block_size
    documents, text_bytes = pieces(opened.tokenizer, text, length, settings.tokens)
    everything = -(-max(map(len, documents)) // size)
    counts = [everything if count == "all" else count for count in settings.budgets]
    modes = [("full", None), *(("sparse", count) for count in dict.fromkeys(counts))]
    rows, full = [], None
    for mode, count in modes:
        nats = _score(opened, documents, mode, count, settings)
        full = full or nats
        mean = _total(nats) / sum(map(len, nats))
        gap, error = paired(nats, full)
        rows.append(
            {
                "mode": mode,
                "block_count": count,
                "nats": mean,
                "perplexity": math.exp(mean),
                "bits_per_byte": _total(nats) / math.log(2) / text_bytes,
                "gap": gap,
                "gap_error": error,
            }
        )
    return {"length": length, "pieces": len(documents), "tokens": sum(map(len, full)), "all": everything, "rows": rows}


def perplexity_by_length(opened: Opened, text: Text, settings: Settings) -> dict:
    """Nats per token in each bucket of positions, full mode and sparse mode at every budget but "all".

    Sequences of the longest length, each a stretch of text after bos; a bucket (a, b] holds the tokens that have a to
    b - 1 tokens before them. `rows`: mode, block_count, nats (one a bucket), error (standard errors over sequences).
    """
    edges = [0, *settings.lengths]
    found = sequences(opened.tokenizer, text, edges[-1], settings.sequences)
    own = opened.model.config.block_count
    counts = dict.fromkeys(sorted({own, *(count for count in settings.budgets if count != "all")}))
    rows = []
    for mode, count in [("full", None), *(("sparse", count) for count in counts)]:
        nats = torch.stack(_score(opened, found, mode, count, settings)).double()  # [sequences, longest - 1]
        means = [nats[:, max(a - 1, 0) : b - 1].mean(1) for a, b in itertools.pairwise(edges)]
        rows.append(
            {
                "mode": mode,
                "block_count": count,
                "nats": [mean.mean().item() for mean in means],
                "error": [_error_of_mean(mean) for mean in means],
            }
        )
    return {"edges": edges, "trained_length": opened.trained_length, "sequences": len(found), "rows": rows}


def paired(nats: Sequence[Tensor], baseline: Sequence[Tensor]) -> tuple[float, float | None]:
    """(mean difference a token, its standard error over pieces, or None for fewer than two)."""
    sizes = torch.tensor([len(piece) for piece in nats], dtype=torch.float64)
    pairs = zip(nats, baseline, strict=True)
    sums = torch.stack([(a.double() - b.double()).sum() for a, b in pairs])
    mean, count = (sums.sum() / sizes.sum()).item(), len(sizes)
    if count < 2:
        return mean, None
    scatter = (sums - mean * sizes).square().sum().item()  # of a ratio: pieces differ in length
    return mean, math.sqrt(scatter * count / (count - 1)) / sizes.sum().item()


def _score(opened: Opened, documents, mode: str, count: int | None, settings: Settings) -> list[Tensor]:
    nats = bare.token_nats(opened.model, documents, mode=mode, block_count=count, batch_tokens=settings.batch_tokens)
    if not all(bool(piece.isfinite().all()) for piece in nats):
        raise not_finite(opened, mode)
    return nats


def _total(nats: Sequence[Tensor]) -> float:
    return sum(piece.double().sum().item() for piece in nats)


def _error_of_mean(values: Tensor) -> float | None:
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else None
