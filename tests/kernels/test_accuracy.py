"""The judge itself: its truth equals the oracle's, and it does fail what is wrong.

Small CPU inputs in fp64; a judge that passes everything would make every GPU test worthless.
"""

import pytest
import torch

import ssa_kernels
from ssa_kernels import BlockSpec
from ssa_kernels.reference import accuracy, masked, oracle

from .support import documents, inputs, outputs_and_gradients, places

# n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none), query rows (0 = all)
CASES = [
    (1, 2, 1, 8, 16, 2, 0, 0),
    (63, 4, 2, 8, 8, 3, 0, 0),
    (63, 4, 2, 8, 5, 3, 14, 0),
    (40, 3, 1, 8, 4, 3, 0, 17),
    (41, 2, 2, 8, 4, 4, 9, 23),
    (33, 2, 1, 8, 4, 64, 1, 0),
]


def build(case):
    n, h_q, h_kv, dim, size, count, mean_length, rows = case
    leaves, upstream = inputs(2, n, h_q, h_kv, dim, n_q=rows or None, dtype=torch.float64)
    docs = documents(2, n, mean_length) if mean_length else None
    index = places(n, rows) if rows else None
    spec = BlockSpec(size, count)
    masks = masked.Masks(*leaves[:2], spec, docs, index)
    return leaves, upstream, spec, masks, {"doc_starts": docs, "query_index": index}


@pytest.mark.parametrize(("case", "most"), [*((case, 10**9) for case in CASES), (CASES[2], 1), (CASES[3], 1)], ids=str)
def test_the_truth_is_the_oracles(case, most, monkeypatch):
    """`most` 1: one query head at a time, as at lengths whose scores do not fit."""
    monkeypatch.setattr(masked, "MOST", most)
    leaves, upstream, spec, masks, options = build(case)
    scale = 8**-0.5
    blocks = oracle.select_blocks(*(x.detach() for x in leaves[:2]), spec, scale, **options)
    names = ("full", "sparse", "ssa", "window", "compressed")
    mine = masked.reference(names, leaves, upstream, masks, blocks, scale, 3.0, torch.float64, trunk="sparse", width=9)
    options["scale"] = scale
    theirs = {
        "full": oracle.full_attention(*leaves[:3], **options),
        "sparse": oracle.sparse_attention(*leaves[:3], spec, **options, blocks=blocks),
        "ssa": oracle.ssa_attention(*leaves, spec, trunk="sparse", **options, blocks=blocks),
        "window": oracle.window_attention(*leaves[:3], 9, **options),
        "compressed": oracle.compressed_attention(*leaves[:3], spec, **options),
    }
    for name, result in theirs.items():
        outputs, gradients = mine[name]
        used = leaves if name == "ssa" else leaves[:3]
        weight = 3.0 / upstream.numel()
        expected = outputs_and_gradients(result, upstream, used, loss_weight=weight)
        for a, b in zip([*outputs, *gradients], expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_oracles_selection_passes(case):
    leaves, _, spec, masks, options = build(case)
    blocks = ssa_kernels.select_blocks(*leaves[:2], spec, **options)
    judged = accuracy.selection(blocks, *leaves[:2], masks, 8**-0.5)
    assert int(judged.malformed) == 0
    assert float(judged.gap) <= 1.0


def test_the_authors_selection_passes_and_the_exact_one_does_not_pass_for_it():
    (q, k, _, _), _ = inputs(1, 700, 2, 1, 8, dtype=torch.float64, grad=False)
    docs = documents(1, 700, 500)
    for doc in (None, docs):
        ours, exact = (
            ssa_kernels.select_blocks(q, k, BlockSpec(topk=kind), doc_starts=doc) for kind in ("reference", "exact")
        )
        masks = masked.Masks(q, k, BlockSpec(topk="reference"), doc, None)
        judged = accuracy.selection(ours, q, k, masks, 8**-0.5)
        assert (int(judged.malformed), float(judged.gap) <= 1.0) == (0, True)
        assert int(accuracy.selection(exact, q, k, masks, 8**-0.5).malformed) > 0


def test_a_wrong_selection_fails():
    leaves, _, spec, masks, _ = build(CASES[1])
    blocks = ssa_kernels.select_blocks(*leaves[:2], spec)
    row = 62  # own block 7, two of the seven before it
    chosen = set(blocks[0, row, 0, 1:].tolist())
    other = sorted({*range(7)} - chosen)
    for wrong in (
        [7, other[0], max(chosen)],
        [7, max(chosen), -1],
        [7, max(chosen), max(chosen)],
        [6, *sorted(chosen)],
    ):
        changed = blocks.clone()
        changed[0, row, 0] = torch.tensor([wrong[0], *sorted(wrong[1:])] if -1 not in wrong else wrong)
        judged = accuracy.selection(changed, *leaves[:2], masks, 8**-0.5)
        assert int(judged.malformed) > 0 or float(judged.gap) > 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_error_above_the_tolerance_fails_and_one_below_passes(dtype):
    truth = torch.randn(64, 64, dtype=torch.float64)
    noise = torch.randn(64, 64, dtype=torch.float64)
    noise *= truth.norm() / noise.norm()
    own = truth.to(dtype) if dtype != torch.float32 else None
    for kind, place in (("output", 0), ("gradient", 1)):
        limit = accuracy.NORM[kind] if dtype in accuracy.HALF else accuracy.NORM_FP32

        def judged(x, place=place):
            pair = [([x], []), ([], [x])][place]
            right = [([truth], []), ([], [truth])][place]
            theirs = [] if own is None else [[([own], []), ([], [own])][place]]
            return accuracy.verdicts(accuracy.errors("x", pair, right, theirs, dtype))[0]

        assert judged(truth + 1.2 * limit * noise).failed
        assert not judged(truth + 0.05 * limit * noise).failed
        spike = truth.clone()
        spike[3, 5] += truth.abs().max() * (4 * torch.finfo(dtype).eps if dtype in accuracy.HALF else 0.01)
        assert judged(spike).failed, kind  # one element wrong in the last places
        poisoned = truth.clone()
        poisoned[0, 0] = float("nan")
        assert judged(poisoned).failed


def test_attention_rounded_as_fused_kernels_round_is_attention():
    """In fp64, where rounding is nothing, the second yardstick is the first."""
    leaves, upstream, spec, masks, options = build(CASES[2])
    blocks = oracle.select_blocks(*(x.detach() for x in leaves[:2]), spec, 8**-0.5, **options)
    names = ("full", "sparse", "ssa", "window", "compressed")
    fixed = names, leaves, upstream, masks, blocks, 8**-0.5, 3.0
    ways = masked.yardsticks(*fixed, dtype=torch.float64, trunk="full", width=9)
    for plain, fused in ways.values():
        for a, b in zip([*plain[0], *plain[1]], [*fused[0], *fused[1]], strict=True):
            torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)  # the fused way computes in fp32


def test_equal_streams_may_differ_by_their_rounding_and_no_more():
    """An alignment loss of streams that are equal is what two roundings of them differ by, squared."""
    rng = torch.Generator().manual_seed(0)
    trunk = torch.randn(4096, generator=rng, dtype=torch.float64)
    truth = ([trunk, torch.tensor(1e-9, dtype=torch.float64)], [])
    rounded = (trunk.bfloat16().double() - trunk).square().mean() * 2
    for loss, fails in ((rounded, False), (30 * rounded, True)):
        got = ([trunk.bfloat16(), loss], [])
        found = accuracy.verdicts(accuracy.errors("ssa", got, truth, [truth], torch.bfloat16))
        assert found[1].failed == fails


def test_the_worst_delta_that_rounding_allows_is_worse_than_a_rounded_one():
    """And moves gradients of q and k only: what the kernels round there is what the third yardstick allows them."""
    leaves, upstream, spec, masks, options = build(CASES[1])
    blocks = oracle.select_blocks(*(x.detach() for x in leaves[:2]), spec, 8**-0.5, **options)
    leaves = [x.detach() * sharp for x, sharp in zip(leaves, (16.0, 1.0, 1.0, 1.0), strict=True)]  # nearly one-hot rows
    leaves = [x.bfloat16() for x in leaves]  # so that only the kernels' own roundings differ
    fixed = ("full",), leaves, upstream.bfloat16(), masks, blocks, 8**-0.5, 3.0
    [_, fused, worst] = masked.yardsticks(*fixed, dtype=torch.bfloat16, ways=masked.WAYS)["full"]
    truth = masked.reference(*fixed, torch.float64)["full"]
    assert torch.equal(fused[0][0], worst[0][0])
    assert torch.equal(fused[1][2], worst[1][2])
    for i in (0, 1):
        assert (worst[1][i].double() - truth[1][i]).norm() > 2 * (fused[1][i].double() - truth[1][i]).norm()
