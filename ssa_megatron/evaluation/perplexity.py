"""Perplexity of an exported folder on packed token rows, as the trainer makes them, in full or sparse mode.

Every document is scored from its own start and its first token is context only, exactly what the trainer's loss counts,
so the figure is comparable with the validation loss of the run. It refuses rows whose document starts do not describe
documents.
"""

import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssa_megatron.errors import DataProblem
from ssa_megatron.hf.generate import check_attention, open_folder


class Perplexity(NamedTuple):
    mode: str
    block_count: int | None
    """Blocks per token; None in full mode."""
    nats_per_token: float
    perplexity: float
    tokens: int
    """Tokens predicted; the first of each document is not."""


def split_documents(tokens: Tensor, doc_starts: Tensor) -> list[list[int]]:
    """Documents of packed rows: tokens `[R, N]` and, `[R, N]` too, the index at which each token's document begins.

    Raises DataProblem for shapes that differ and for starts that are not those of documents.
    """
    tokens, doc_starts = torch.as_tensor(tokens), torch.as_tensor(doc_starts)
    if tokens.dim() != 2 or tokens.shape != doc_starts.shape or tokens.numel() == 0:
        raise DataProblem(
            f"tokens {tuple(tokens.shape)} and doc_starts {tuple(doc_starts.shape)} must both be [rows, tokens]",
            id="rows-shape",
        )
    index = torch.arange(tokens.shape[1])
    fresh = doc_starts == index
    expected = torch.where(fresh, index, -1).cummax(1).values
    if not torch.equal(expected, doc_starts.to(expected)):
        row, column = (expected != doc_starts).nonzero()[0].tolist()
        raise DataProblem(
            f"doc_starts[{row}, {column}] = {int(doc_starts[row, column])} is neither {column} nor the start before it",
            remedy="pass the rows as ssa_pipelines.evaluation_rows gives them",
            id="rows-document-starts",
        )
    documents = []
    for row, new in zip(tokens.tolist(), fresh, strict=True):
        edges = [*new.nonzero().flatten().tolist(), len(row)]
        documents += [row[a:b] for a, b in itertools.pairwise(edges)]
    return documents


def perplexity(
    target,
    tokens: Tensor,
    doc_starts: Tensor,
    *,
    mode: str | None = None,
    block_count: int | None = None,
    batch_tokens: int = 4096,
    device: str = "cpu",
) -> Perplexity:
    """Score rows (tokens and document starts, `[R, N]`) with `target`, a folder or a model that `open_folder` loaded.

    Raises ConfigError (mode, block_count), DataProblem (rows), CheckpointError (folder).
    """
    from ssa_megatron.hf import bare

    check_attention(mode, block_count)
    documents = split_documents(tokens, doc_starts)
    model = open_folder(target, device=device)[0] if isinstance(target, str | Path) else target
    highest = max(max(document) for document in documents)
    if highest >= model.config.vocab_size:
        raise DataProblem(
            f"token {highest} is outside the model's vocabulary of {model.config.vocab_size}",
            remedy="prepare the rows with the model's own tokenizer",
            id="token-outside-vocabulary",
        )
    mode = mode or model.config.inference_mode
    nats, counted = bare.score_documents(
        model, documents, mode=mode, block_count=block_count, batch_tokens=batch_tokens
    )
    if counted == 0:
        raise DataProblem(
            "no document has a second token to predict", remedy="pass longer documents", id="documents-too-short"
        )
    used = (block_count or model.config.block_count) if mode == "sparse" else None
    return Perplexity(mode, used, nats / counted, math.exp(nats / counted), counted)
