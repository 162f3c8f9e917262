"""The PyTorch backend against the oracle: values and every gradient, odd lengths, head layouts, documents, query
subsets.

One tolerance, 1e-5 of the oracle's fp64 norm for fp32 inputs; selections must be equal.
Bigger grids run on a GPU (tests/gpu/kernels).
"""

import pytest
import torch

import ssa_kernels
from ssa_kernels import BlockSpec
from ssa_kernels.reference import oracle

from .support import SPEC, assert_close, documents, inputs, outputs_and_gradients, places

# n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none), query rows (0 = all)
CASES = [
    (1, 2, 1, 16, 16, 2, 0, 0),
    (15, 1, 1, 64, 16, 2, 0, 0),
    (16, 4, 2, 16, 16, 2, 0, 0),
    (17, 8, 2, 16, 16, 2, 4, 0),
    (63, 8, 1, 128, 16, 3, 0, 0),
    (100, 16, 1, 16, 16, 3, 30, 0),
    (100, 2, 2, 64, 32, 2, 0, 40),
    (129, 4, 4, 64, 16, 3, 0, 0),
    (129, 4, 2, 16, 16, 4, 1, 0),
    (129, 6, 2, 20, 7, 5, 50, 77),
    (257, 4, 1, 64, 32, 3, 100, 0),
    (257, 2, 1, 16, 16, 4, 0, 130),
    (257, 4, 2, 16, 16, 16, 129, 64),
]


def build(case, dtype=torch.float32):
    n, h_q, h_kv, dim, size, count, mean_length, rows = case
    leaves, upstream = inputs(2, n, h_q, h_kv, dim, n_q=rows or None, dtype=dtype)
    docs = documents(2, n, mean_length) if mean_length else None
    index = places(n, rows) if rows else None
    return leaves, upstream, BlockSpec(size, count), dim**-0.5, docs, index


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_stream_matches_the_oracle(case):
    leaves, upstream, spec, scale, docs, index = build(case)
    leaves64 = [x.detach().double().requires_grad_() for x in leaves]
    blocks = ssa_kernels.select_blocks(*leaves[:2], spec, doc_starts=docs, query_index=index)
    assert torch.equal(blocks, oracle.select_blocks(*(x.detach() for x in leaves64[:2]), spec, scale, docs, index))
    ours = {"doc_starts": docs, "query_index": index}
    theirs = {"scale": scale, **ours}
    pairs = {
        "full": (ssa_kernels.full_attention, oracle.full_attention, ()),
        "sparse": (ssa_kernels.sparse_attention, oracle.sparse_attention, (spec,)),
        "window": (ssa_kernels.window_attention, oracle.window_attention, (20,)),
        "compressed": (ssa_kernels.compressed_attention, oracle.compressed_attention, (spec,)),
    }
    for name, (backend, truth, extra) in pairs.items():
        got = outputs_and_gradients(backend(*leaves[:3], *extra, **ours), upstream, leaves[:3])
        expected = outputs_and_gradients(truth(*leaves64[:3], *extra, **theirs), upstream, leaves64[:3])
        assert_close(got, expected, 1e-5, name)
    for trunk in ("full", "sparse"):
        got = outputs_and_gradients(ssa_kernels.ssa_attention(*leaves, spec, trunk=trunk, **ours), upstream, leaves)
        truth = oracle.ssa_attention(*leaves64, spec, trunk=trunk, blocks=blocks, **theirs)
        assert_close(got, outputs_and_gradients(truth, upstream, leaves64), 1e-5, trunk)
    statistics = ssa_kernels.attention_statistics(*leaves[:2], spec, **ours)
    assert_close(statistics, oracle.attention_statistics(*leaves64[:2], spec, **theirs), 1e-5, "statistics")


def test_fp64_inputs_are_computed_in_fp64():
    leaves, upstream, spec, scale, docs, index = build(CASES[9], torch.float64)
    got = ssa_kernels.ssa_attention(*leaves, spec, trunk="sparse", doc_starts=docs, query_index=index)
    expected = oracle.ssa_attention(*leaves, spec, trunk="sparse", scale=scale, doc_starts=docs, query_index=index)
    pair = (outputs_and_gradients(x, upstream, leaves) for x in (got, expected))
    assert_close(*pair, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_only_inputs_and_outputs(dtype):
    leaves, upstream, spec, scale, docs, _ = build((129, 4, 2, 16, 16, 3, 60, 0), dtype)
    leaves64 = [x.detach().double().requires_grad_() for x in leaves]
    blocks = ssa_kernels.select_blocks(*leaves[:2], spec, doc_starts=docs)
    got = outputs_and_gradients(
        ssa_kernels.ssa_attention(*leaves, spec, trunk="full", doc_starts=docs), upstream, leaves
    )
    truth = oracle.ssa_attention(*leaves64, spec, trunk="full", scale=scale, doc_starts=docs, blocks=blocks)
    assert_close(got, outputs_and_gradients(truth, upstream, leaves64), 5e-3)


@pytest.mark.parametrize("gap", [0.0, 40.0, 90.0, 120.0])
def test_scores_far_outside_the_selected_blocks_do_not_underflow_the_sparse_stream(gap):
    """A key outside the selection, `gap` nats above the rest: exp(full maximum) alone would erase the sparse row."""
    leaves, upstream = inputs(1, 200, 2, 1, 16)
    with torch.no_grad():
        leaves[0][..., 0], leaves[1][..., 0] = 4.0, 0.0
        leaves[1][:, 5, :, 0] = gap
        leaves[1][:, [0, 1, 2, 3, 4, 6, 7], :, 0] = -gap / 6  # hides block 0 from routing, which sees the mean
    leaves64 = [x.detach().double().requires_grad_() for x in leaves]
    spec = BlockSpec(16, 2)
    blocks = ssa_kernels.select_blocks(*leaves[:2], spec)
    got = outputs_and_gradients(ssa_kernels.ssa_attention(*leaves, spec, trunk="sparse"), upstream, leaves)
    truth = oracle.ssa_attention(*leaves64, spec, trunk="sparse", scale=0.25, blocks=blocks)
    assert_close(got, outputs_and_gradients(truth, upstream, leaves64), 1e-4)  # fp32 logits near 100 carry 1e-5


def test_budget_of_the_whole_sequence_makes_sparse_equal_full():
    leaves, upstream = inputs(2, 100, 4, 2, 16)
    spec = BlockSpec(16, 7)
    full, loss = ssa_kernels.ssa_attention(*leaves, spec, trunk="full")
    sparse, _ = ssa_kernels.ssa_attention(*leaves, spec, trunk="sparse")
    assert float(loss) == 0.0
    assert_close([sparse], [full], 1e-6)
    pair = (
        outputs_and_gradients(ssa_kernels.ssa_attention(*leaves, spec, trunk=t), upstream, leaves)[2:]
        for t in ("full", "sparse")
    )
    assert_close(*pair, 1e-6)


def test_zero_trunk_gradient_sends_opposite_gradients_to_the_streams():
    """v enters both streams linearly, and a softmax row sums to one: opposite dO cancel in the sum of dv over all
    keys."""
    leaves, _ = inputs(1, 129, 4, 1, 16, dtype=torch.float64)
    _, loss = ssa_kernels.ssa_attention(*leaves, SPEC, trunk="full")
    dq, _, dv, dgate = torch.autograd.grad(loss, leaves)
    assert dq.norm() > 0
    assert dgate.norm() > 0
    torch.testing.assert_close(dv.sum(1), torch.zeros_like(dv.sum(1)), atol=1e-15, rtol=0)


def test_the_alignment_loss_does_not_depend_on_the_trunk():
    leaves, _ = inputs(1, 129, 4, 1, 16)
    losses = [ssa_kernels.ssa_attention(*leaves, SPEC, trunk=t)[1] for t in ("full", "sparse")]
    assert torch.equal(*losses)
    assert losses[0].dtype == torch.float32


def all_results(leaves, upstream, docs=None):
    results = [ssa_kernels.select_blocks(*leaves[:2], SPEC, doc_starts=docs)]
    for trunk in ("full", "sparse"):
        result = ssa_kernels.ssa_attention(*leaves, SPEC, trunk=trunk, doc_starts=docs)
        results += [result[0], *torch.autograd.grad((result[0] * upstream).sum(), leaves)]
    results.append(ssa_kernels.compressed_attention(*leaves[:3], SPEC, doc_starts=docs))
    results.append(ssa_kernels.window_attention(*leaves[:3], 20, doc_starts=docs))
    return results


def test_perturbing_the_future_leaves_the_past_bit_identical():
    leaves, upstream = inputs(1, 200, 4, 2, 16)
    upstream[:, 130:] = 0  # so that gradients of the past see the past only
    before = all_results(leaves, upstream)
    changed = [x.detach().clone() for x in leaves]
    for x in changed:
        x[:, 130:] = torch.rand_like(x[:, 130:])
    after = all_results([x.requires_grad_() for x in changed], upstream)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :130], b[:, :130])


def test_perturbing_one_document_leaves_the_others_bit_identical():
    leaves, upstream = inputs(1, 200, 4, 2, 16)
    docs = torch.zeros(1, 200, dtype=torch.int32)
    docs[:, 37:] = 37
    docs[:, 151:] = 151
    before = all_results(leaves, upstream, docs)
    changed = [x.detach().clone() for x in leaves]
    for x in changed:
        x[:, 37:151] = torch.rand_like(x[:, 37:151])
    after = all_results([x.requires_grad_() for x in changed], upstream, docs)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :37], b[:, :37])
        assert torch.equal(a[:, 151:], b[:, 151:])


def test_a_packed_document_behaves_as_it_does_alone():
    leaves, upstream = inputs(1, 200, 4, 2, 16)
    docs = torch.zeros(1, 200, dtype=torch.int32)
    docs[:, 37:] = 37
    docs[:, 151:] = 151
    packed = all_results(leaves, upstream, docs)
    alone = all_results([x.detach()[:, 37:151].requires_grad_() for x in leaves], upstream[:, 37:151])
    assert torch.equal(packed[0][:, 37:151], alone[0])
    assert_close([x[:, 37:151] for x in packed[1:]], alone[1:], 1e-6)


def test_two_runs_are_bit_identical():
    leaves, upstream = inputs(2, 257, 4, 2, 16)
    for a, b in zip(all_results(leaves, upstream), all_results(leaves, upstream), strict=True):
        assert torch.equal(a, b)


def test_padding_tokens_that_are_documents_of_one_attend_to_themselves():
    (q, k, v, gate), _ = inputs(1, 20, 2, 2, 16)
    docs = torch.arange(20, dtype=torch.int32)[None]
    for result in (
        ssa_kernels.full_attention(q, k, v, doc_starts=docs),
        ssa_kernels.window_attention(q, k, v, 4, doc_starts=docs),
    ):
        torch.testing.assert_close(result, v)
    assert float(ssa_kernels.ssa_attention(q, k, v, gate, SPEC, trunk="full", doc_starts=docs)[1]) == 0.0


def test_authors_selection_matches_the_oracle():
    (q, k, _, _), _ = inputs(1, 800, 4, 2, 8, grad=False)
    docs = torch.zeros(1, 800, dtype=torch.int32)
    docs[:, 11:] = 11
    index = torch.arange(3, 800, 7, dtype=torch.int32)
    for doc in (None, docs):
        arguments = {"doc_starts": doc, "query_index": index}
        got = ssa_kernels.select_blocks(q[:, index], k, BlockSpec(topk="reference"), **arguments)
        expected = oracle.select_blocks(
            q[:, index].double(), k.double(), BlockSpec(topk="reference"), 8**-0.5, **arguments
        )
        assert torch.equal(got, expected)


def test_tied_scores_choose_the_lower_blocks():
    q, k = torch.zeros(1, 100, 2, 4), torch.randn(1, 100, 1, 4)
    assert ssa_kernels.select_blocks(q, k, BlockSpec(8, 4))[0, 99, 0].tolist() == [12, 0, 1, 2]


def test_given_blocks_are_used_and_an_empty_selection_gives_zero():
    (q, k, v, _), _ = inputs(1, 40, 2, 1, 16)
    blocks = ssa_kernels.select_blocks(q, k, SPEC)
    torch.testing.assert_close(
        ssa_kernels.sparse_attention(q, k, v, SPEC, blocks=blocks), ssa_kernels.sparse_attention(q, k, v, SPEC)
    )
    nothing = torch.full_like(blocks, -1)
    result = ssa_kernels.sparse_attention(q, k, v, SPEC, blocks=nothing)
    assert not result.any()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(result.sum(), (q, k, v)))
