"""What a packed row predicts: labels stay inside their document, and every layer is told the same boundaries."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from ssa_megatron.model.batch import ForwardContext, SSABatch, next_tokens
from ssa_megatron.model.rope import rotary_table
from tests.ssa_megatron.support import tiny

# three documents (of 3, 1 and 4 tokens), then two places of padding, which are documents of one token each
TOKENS = torch.tensor([[11, 12, 13, 21, 31, 32, 33, 34, 0, 0]])
STARTS = torch.tensor([[0, 0, 0, 3, 4, 4, 4, 4, 8, 9]], dtype=torch.int32)


def place(rank: int = 0, size: int = 1):
    """Where a context-parallel rank stands."""
    return SimpleNamespace(device=torch.device("cpu"), cp_rank=rank, cp_size=size)


def test_only_tokens_with_a_successor_in_their_document_count():
    labels, counted = next_tokens(TOKENS, STARTS)
    assert labels.tolist() == [[12, 13, 0, 0, 32, 33, 34, 0, 0, 0]]
    assert counted.int().tolist() == [[1, 1, 0, 0, 1, 1, 1, 0, 0, 0]]


def test_every_token_but_a_documents_first_is_a_label_once():
    labels, counted = next_tokens(TOKENS, STARTS)
    assert labels[counted].tolist() == [12, 13, 32, 33, 34]


def test_one_document_a_row_predicts_all_but_its_first_token():
    tokens = torch.arange(7)[None]
    labels, counted = next_tokens(tokens, torch.zeros(1, 7, dtype=torch.int32))
    assert labels.tolist() == [[1, 2, 3, 4, 5, 6, 0]]
    assert counted.sum() == 6


def test_a_row_of_one_token_documents_counts_nothing():
    labels, counted = next_tokens(torch.full((1, 5), 9), torch.arange(5, dtype=torch.int32)[None])
    assert not counted.any()
    assert not labels.any()


def test_rows_of_a_micro_batch_do_not_touch():
    tokens, starts = TOKENS.repeat(2, 1), torch.cat((STARTS, torch.zeros_like(STARTS)))
    labels, counted = next_tokens(tokens, starts)
    alone = [next_tokens(tokens[i : i + 1], starts[i : i + 1]) for i in (0, 1)]
    assert torch.equal(labels, torch.cat([a for a, _ in alone]))
    assert torch.equal(counted, torch.cat([a for _, a in alone]))


def test_pack_does_not_change_what_the_stream_gave():
    tokens, starts = TOKENS.clone(), STARTS.clone()
    SSABatch.pack(tokens, starts, place(), trunk="full")
    assert torch.equal(tokens, TOKENS)
    assert torch.equal(starts, STARTS)


def test_pack_restarts_positions_at_each_document_in_sequence_first_layout():
    recipe = tiny()
    batch = SSABatch.pack(TOKENS, STARTS, place(), trunk="sparse")
    context = ForwardContext.begin(batch, recipe, alignment_scale=0.25)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 2, 3, 0, 0]])
    expected = rotary_table(positions, recipe.model.head_dim, recipe.model.rope_theta, None)
    assert all(torch.equal(a, b) for a, b in zip(context.rotary, expected, strict=True))
    assert context.rotary[0].shape == (10, 1, 1, recipe.model.head_dim)
    assert (batch.trunk, context.alignment_scale) == ("sparse", 0.25)


def test_a_batch_cannot_be_changed():
    batch = SSABatch.pack(TOKENS, STARTS, place(), trunk="full")
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.trunk = "sparse"


def test_two_forward_passes_share_no_list_of_losses():
    batch = SSABatch.pack(TOKENS, STARTS, place(), trunk="full")
    one, two = (ForwardContext.begin(batch, tiny()) for _ in range(2))
    one.collector.alignment.append(torch.ones(()))
    assert two.collector.alignment == []


@pytest.mark.parametrize("size", [2, 3])
def test_context_parallel_ranks_share_a_row_and_lose_nothing(size):
    tokens = torch.arange(12 * size).view(2, -1)
    starts = torch.zeros(tokens.shape, dtype=torch.int32)
    starts[:, 5:] = 5
    whole = SSABatch.pack(tokens, starts, place(), trunk="full")
    parts = [SSABatch.pack(tokens, starts, place(r, size), trunk="full") for r in range(size)]
    where = torch.cat([part.query_index for part in parts]).long()
    assert sorted(where.tolist()) == list(range(6 * size))
    for name in ("tokens", "labels", "counted", "positions"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], 1), getattr(whole, name)[:, where])
    costs = {int(part.query_index.sum()) for part in parts}  # keys a causal row sees: the same for every rank
    assert len(costs) == 1
    assert all(torch.equal(part.doc_starts, starts) for part in parts)


def test_rows_of_one_document_carry_no_boundaries():
    starts = torch.zeros_like(STARTS)
    assert SSABatch.pack(TOKENS, starts, place(), trunk="full").doc_starts is None
