"""Nats by budget and by position are those of the model alone, and their errors those of the textbook."""

import itertools
import math

import pytest
import torch

from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.scores import paired, perplexity_by_length, quality_against_budget
from ssa_megatron.evaluation.text import encode, pieces, sequences


def nats_of(model, tokens, **options):
    """Each token on its own: the straightforward way."""
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), use_cache=False, **options).logits[0].double()
    return [-logits[i].log_softmax(-1)[token].item() for i, token in enumerate(tokens[1:])]


def test_budgets_are_scored_token_by_token(tiny, body):
    found = quality_against_budget(tiny, body, Settings(tokens=600, budgets=(1, 3, "all"), batch_tokens=256))
    documents, size = pieces(tiny.tokenizer, body, 128, 600)
    want = {
        count: [n for d in documents for n in nats_of(tiny.model, d, inference_mode="sparse", block_count=count)]
        for count in (1, 3)
    }
    full, one, three, everything = found["rows"]
    blocks = math.ceil(max(map(len, documents)) / tiny.model.config.block_size)
    assert [row["block_count"] for row in found["rows"]] == [None, 1, 3, blocks]
    for row, count in ((one, 1), (three, 3)):
        mean = math.fsum(want[count]) / len(want[count])
        assert row["nats"] == pytest.approx(mean, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(math.fsum(want[count]) / math.log(2) / size, rel=1e-5)
        assert row["gap"] == pytest.approx(row["nats"] - full["nats"], rel=1e-6)
        assert row["gap_error"] > 0
    assert everything["gap"] == 0
    assert everything["gap_error"] == 0
    assert found["tokens"] == len(want[1]) == sum(len(document) - 1 for document in documents)


def test_buckets_hold_the_tokens_of_their_positions(tiny, body):
    found = perplexity_by_length(tiny, body, Settings(lengths=(16, 100, 300), sequences=2, budgets=(2, "all")))
    assert found["edges"] == [0, 16, 100, 300]
    assert [(row["mode"], row["block_count"]) for row in found["rows"]] == [
        ("full", None),
        ("sparse", 2),
        ("sparse", 3),
    ]
    texts = sequences(tiny.tokenizer, body, 300, 2)
    assert list(map(len, texts)) == [300, 300]
    for row in found["rows"]:
        options = {"inference_mode": row["mode"], "block_count": row["block_count"]}
        nats = [[0.0, *nats_of(tiny.model, tokens, **options)] for tokens in texts]  # nats[s][j]: of the token at j
        for (a, b), mean, error in zip(itertools.pairwise(found["edges"]), row["nats"], row["error"], strict=True):
            first, second = (math.fsum(one[max(a, 1) : b]) / (b - max(a, 1)) for one in nats)
            assert mean == pytest.approx((first + second) / 2, rel=1e-5)
            assert error == pytest.approx(abs(first - second) / 2, rel=1e-2)  # of two values: half their distance


def test_the_paired_error_of_equal_pieces_is_the_textbooks():
    generator = torch.Generator().manual_seed(3)
    a, b = (list(torch.randn(7, 30, generator=generator)) for _ in range(2))
    means = torch.stack(a).double().mean(1) - torch.stack(b).double().mean(1)
    mean, error = paired(a, b)
    assert mean == pytest.approx(means.mean().item())
    assert error == pytest.approx((means.std() / math.sqrt(7)).item())
    assert paired(a[:1], b[:1]) == (pytest.approx(means[0].item()), None)


def test_pieces_are_the_documents_and_the_first_begins_with_bos(tiny, body):
    found, size = pieces(tiny.tokenizer, body, 50, 10**9)
    whole = [[tiny.tokenizer.bos_token_id, *encode(tiny.tokenizer, document)] for document in body.documents]
    cut = [d[at : at + 50] for d in whole for at in range(0, len(d), 50)]
    assert found == [piece for piece in cut if len(piece) > 1]
    assert size <= body.fingerprint["bytes"]
    few, _ = pieces(tiny.tokenizer, body, 50, 120)
    assert sum(map(len, few)) in (119, 120)  # a last token alone predicts nothing
    assert few[:-1] == found[: len(few) - 1]
