"""Selections of the Triton kernels on the GPU against fp64: every budget, sharp logits, equal scores, documents.

Sets must be fp64's except where scores tie within 1e-5; equal scores go to the lower blocks exactly; two runs are bit-identical.
"""

import pytest
import torch

import ssa_kernels
from ssa_kernels import BlockSpec

from ...kernels.support import assert_same_selection, documents, inputs, places

pytestmark = pytest.mark.gpu

# n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none), query rows (0 = all)
CASES = [
    (3000, 32, 2, 64, 16, 1, 0, 0),
    (3000, 32, 2, 64, 16, 2, 0, 0),
    (3000, 32, 2, 64, 16, 3, 800, 0),
    (5000, 32, 2, 64, 16, 16, 0, 300),
    (5000, 16, 16, 128, 16, 16, 0, 300),
    (3000, 8, 8, 64, 16, 16, 1500, 0),
    (3000, 24, 8, 128, 16, 16, 1000, 0),
    (3000, 8, 4, 32, 16, 64, 0, 400),
    (4000, 4, 2, 64, 4, 200, 0, 200),
    (4000, 2, 2, 64, 2, 600, 3000, 100),
    (4000, 4, 2, 128, 4, 900, 0, 50),
    (9000, 8, 2, 64, 128, 16, 0, 300),
    (2000, 8, 2, 64, 64, 5, 1, 0),
]


def build(case, dtype, sharpness=1.0):
    n, h_q, h_kv, dim, size, count, mean_length, rows = case
    (q, k, _, _), _ = inputs(2, n, h_q, h_kv, dim, n_q=rows or None, grad=False)
    docs = documents(2, n, mean_length).cuda() if mean_length else None
    index = places(n, rows).cuda() if rows else None
    q, k = (q * sharpness).to("cuda", dtype), k.to("cuda", dtype)
    return q, k, BlockSpec(size, count), {"doc_starts": docs, "query_index": index}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_selection_matches_fp64(case, dtype):
    q, k, spec, options = build(case, dtype)
    blocks = ssa_kernels.select_blocks(q, k, spec, **options, backend="triton")
    assert_same_selection(blocks, q, k, spec, **options)
    assert torch.equal(blocks, ssa_kernels.select_blocks(q, k, spec, **options, backend="triton"))


@pytest.mark.parametrize("heads", [(32, 2), (8, 8), (32, 8)], ids=str)
@pytest.mark.parametrize("sharpness", [4.0, 16.0, 100.0])
def test_sharp_logits(sharpness, heads):
    q, k, spec, options = build((3000, *heads, 64, 16, 16, 0, 500), torch.bfloat16, sharpness)
    blocks = ssa_kernels.select_blocks(q, k, spec, **options, backend="triton")
    assert_same_selection(blocks, q, k, spec, **options)


@pytest.mark.parametrize("heads", [(32, 2), (8, 8), (32, 8)], ids=str)
@pytest.mark.parametrize("count", [2, 16, 300])
def test_equal_scores_go_to_the_lower_blocks(count, heads):
    q, k, spec, _ = build((6000, *heads, 64, 8, count, 0, 0), torch.bfloat16)
    blocks = ssa_kernels.select_blocks(q, k[:, :1].expand_as(k), spec, backend="triton")
    own = torch.arange(6000, device="cuda", dtype=torch.int32)[:, None] // 8
    lowest = torch.arange(count - 1, device="cuda", dtype=torch.int32).expand(6000, -1)
    expected = torch.cat([own, torch.where(lowest < own, lowest, -1)], 1)
    assert torch.equal(blocks, expected[None, :, None].expand_as(blocks))
