"""The oracle is judged by arithmetic alone: gradcheck in fp64, the paper's bound, and hand-made selections.

Small inputs; everything else in this package is judged by the oracle.
It refuses to trust a gradient that finite differences do not confirm.
"""

import pytest
import torch

from ssa_kernels import BlockSpec
from ssa_kernels.reference import oracle

from .support import documents, inputs, places

SCALE = 0.4


@pytest.fixture
def tiny():
    (q, k, v, gate), _ = inputs(1, 11, 2, 1, 3, dtype=torch.float64)
    return q, k, v, gate, documents(1, 11, 5)


def test_oracle_gradients_pass_finite_differences(tiny):
    q, k, v, _, docs = tiny
    spec = BlockSpec(2, 2)
    blocks = oracle.select_blocks(q.detach(), k.detach(), spec, SCALE, docs)
    for function in (
        lambda q, k, v: oracle.full_attention(q, k, v, SCALE, docs),
        lambda q, k, v: oracle.sparse_attention(q, k, v, spec, SCALE, docs, blocks=blocks),
        lambda q, k, v: oracle.window_attention(q, k, v, 3, SCALE, docs),
        lambda q, k, v: oracle.compressed_attention(q, k, v, spec, SCALE, docs),
    ):
        assert torch.autograd.gradcheck(function, (q, k, v))


@pytest.mark.parametrize("trunk", ["full", "sparse"])
def test_gated_trunk_passes_finite_differences(tiny, trunk):
    q, k, v, gate, docs = tiny
    spec = BlockSpec(2, 2)
    blocks = oracle.select_blocks(q.detach(), k.detach(), spec, SCALE, docs)

    def output(q, k, v, gate):
        return oracle.ssa_attention(q, k, v, gate, spec, trunk=trunk, scale=SCALE, doc_starts=docs, blocks=blocks)[0]

    assert torch.autograd.gradcheck(output, (q, k, v, gate))


def test_alignment_loss_is_twice_the_plain_smooth_l1(tiny):
    q, k, v, gate, docs = tiny
    spec = BlockSpec(2, 2)
    full, loss = oracle.ssa_attention(q, k, v, gate, spec, trunk="full", scale=SCALE, doc_starts=docs)
    sparse, _ = oracle.ssa_attention(q, k, v, gate, spec, trunk="sparse", scale=SCALE, doc_starts=docs)
    torch.testing.assert_close(loss, 2 * torch.nn.functional.smooth_l1_loss(full, sparse))


@pytest.mark.parametrize("seed", range(4))
def test_theorem_1_bounds_the_distance_of_the_streams(seed):
    (q, k, v, _), _ = inputs(1, 70, 4, 2, 8, dtype=torch.float64, seed=seed, grad=False)
    q = q * (1 + 3 * seed)
    spec = BlockSpec(4, 3)
    blocks = oracle.select_blocks(q, k, spec, SCALE)
    inside = oracle.sparse_mask(q, k, blocks, spec)
    weight = oracle.attention_weights(q, k, oracle.full_mask(q, k), SCALE)
    dropped = (weight * ~inside).sum(-1).transpose(1, 2)  # [B, N, Hq]
    full = oracle.full_attention(q, k, v, SCALE)
    sparse = oracle.sparse_attention(q, k, v, spec, SCALE, blocks=blocks)
    largest = v.norm(dim=-1).cummax(1).values.repeat_interleave(2, 2)
    assert ((full - sparse).norm(dim=-1) <= dropped * (largest + sparse.norm(dim=-1)) + 1e-12).all()


def test_selection_by_hand():
    """Block 1 points at the query, block 0 away; the third candidate lies between."""
    k = torch.zeros(1, 9, 1, 2)
    k[0, 0:2], k[0, 2:4], k[0, 4:6] = torch.tensor([-1.0, 0]), torch.tensor([5.0, 0]), torch.tensor([1.0, 0])
    q = torch.zeros(1, 9, 1, 2)
    q[..., 0] = 1.0
    chosen = oracle.select_blocks(q, k, BlockSpec(2, 3), 1.0)[0, :, 0].tolist()
    assert chosen[0] == [0, -1, -1]
    assert chosen[5] == [2, 0, 1]
    assert chosen[8] == [4, 1, 2]


def test_ties_go_to_the_lower_block():
    q, k = torch.zeros(1, 20, 2, 4), torch.randn(1, 20, 1, 4)
    assert oracle.select_blocks(q, k, BlockSpec(2, 4), 1.0)[0, 19, 0].tolist() == [9, 0, 1, 2]


def test_authors_selection_counts_match_the_published_measurement():
    """9 to 16 blocks, 14.25 on average and 44 % of tokens short of 16, past the first 256 tokens."""
    (q, k, _, _), _ = inputs(1, 768, 1, 1, 4, grad=False)
    index = torch.arange(256, 768, 16, dtype=torch.int32)
    chosen = oracle.select_blocks(q[:, index], k, BlockSpec(topk="reference"), SCALE, query_index=index)
    count = (chosen >= 0).sum(-1).float()
    assert count.min() == 9
    assert count.max() == 16
    assert count.mean() == 14.25
    assert (count < 16).float().mean() == pytest.approx(0.4375)


def test_query_rows_may_come_in_any_order():
    (q, k, v, _), _ = inputs(1, 30, 2, 1, 4, grad=False)
    index = places(30, 12)
    whole = oracle.full_attention(q, k, v, SCALE)
    torch.testing.assert_close(oracle.full_attention(q[:, index], k, v, SCALE, query_index=index), whole[:, index])
