"""Both streams in one pass over key tiles, on the GPU against fp64: groups of 1 to 8, block sizes, documents, odd logits.

Tolerances, poisoned memory and inputs are those of test_triton_on_gpu.py.
"""

import pytest
import torch

import kernels
from kernels import BlockSpec, torch_backend, triton_backend, triton_config, triton_dual, triton_dual_backward

from .test_triton_on_gpu import build, compare, exact, graded, poisoned_memory  # noqa: F401 (a fixture)

pytestmark = pytest.mark.gpu

# n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none), query rows (0 = all)
CASES = [
    (1, 8, 8, 128, 16, 4, 0, 0),
    (15, 4, 4, 64, 16, 4, 0, 0),
    (17, 4, 2, 64, 16, 2, 5, 0),
    (63, 2, 1, 64, 32, 2, 0, 0),
    (129, 8, 1, 128, 16, 4, 0, 0),
    (129, 4, 4, 64, 16, 4, 1, 0),
    (1000, 8, 8, 128, 16, 16, 0, 0),
    (1000, 16, 2, 64, 16, 16, 300, 0),
    (1000, 16, 4, 128, 64, 4, 400, 0),
    (1000, 8, 4, 64, 128, 3, 150, 0),
    (1000, 6, 2, 80, 16, 8, 200, 0),
    (1000, 4, 2, 32, 32, 8, 90, 0),
    (2003, 32, 8, 128, 16, 16, 0, 0),
    (2003, 8, 8, 128, 16, 16, 500, 0),
    (2048, 8, 2, 64, 16, 16, 700, 0),
    (4100, 4, 1, 128, 16, 16, 0, 0),
]
EVERY = [(case, torch.bfloat16) for case in CASES]
SOME = [(case, dtype) for dtype in (torch.float16, torch.float32) for case in CASES[1::4]]


@pytest.fixture(autouse=True)
def one_pass(monkeypatch):
    """The rule that chooses by length is put aside: what is tested is the pass."""
    monkeypatch.setattr(triton_backend, "dual", lambda *_: True)


@pytest.mark.parametrize(("case", "dtype"), EVERY + SOME, ids=str)
def test_one_pass_over_keys_matches_fp64(case, dtype):
    leaves, upstream, spec, options = build(case, dtype)
    blocks = kernels.select_blocks(*leaves[:2], spec, **options, backend="triton")
    for trunk in ("full", "sparse"):
        truth = exact(leaves)
        got = graded(kernels.ssa_attention(*leaves, spec, trunk=trunk, **options, backend="triton"), upstream, leaves)
        stream = torch_backend.Stream("both", block_size=spec.block_size)
        geometry = torch_backend.Geometry(*truth[:2], stream, *options.values(), blocks)
        expected = torch_backend._TwoStreams.apply(*truth, geometry, leaves[0].shape[3] ** -0.5, trunk)
        compare(got, graded(expected, upstream, truth), dtype, f"ssa {trunk}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gap", [0, 40, 90, 120])
def test_an_unselected_key_far_above_every_selected_one(gap, dtype):
    leaves, up_full, spec, _ = build((1000, 8, 2, 128, 16, 8, 0, 0), dtype)
    q, k, v, _ = (x.detach() for x in leaves)
    blocks = kernels.select_blocks(q, k, spec, backend="triton")
    blocks[..., 1:] = blocks[..., 1:].masked_fill(blocks[..., 1:] == 0, -1)
    q[..., 0], k[:, 5], k[:, 5, :, 0] = 4.0, 0.0, gap * 128**0.5 / 4  # key 5 scores `gap` nats, in no selection
    up_sparse, scale = up_full.flip(1).contiguous(), 128**-0.5
    truth = exact([q, k, v])
    outputs = [
        kernels.full_attention(*truth, backend="torch"),
        kernels.sparse_attention(*truth, spec, blocks=blocks, backend="torch"),
    ]
    total = (outputs[0] * up_full.double()).sum() + (outputs[1] * up_sparse.double()).sum()
    expected = outputs, torch.autograd.grad(total, truth)
    config = triton_config.choose(q)
    bits = triton_dual.selection_bits(blocks, 1000, 16, None)
    full, lse_full, sparse, lse_sparse = triton_dual.forward(q, k, v, *bits, 16, scale, None, config)
    deltas = [(o * u).sum(-1).float().detach() for o, u in zip(outputs, (up_full, up_sparse), strict=True)]
    grads = triton_dual_backward.backward(
        q, k, v, blocks, 16, scale, None, up_full, up_sparse, lse_full, lse_sparse, *deltas, config
    )
    compare(([full, sparse], grads), expected, dtype, f"gap {gap}")


@pytest.mark.parametrize("mean_length", [0, 300])
def test_two_runs_are_bit_identical(mean_length):
    leaves, upstream, spec, options = build((1000, 16, 4, 128, 16, 16, mean_length, 0), torch.bfloat16)
    runs = []
    for _ in range(2):
        results, gradients = graded(
            kernels.ssa_attention(*leaves, spec, trunk="sparse", **options, backend="triton"), upstream, leaves
        )
        runs.append([*results, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_future_and_other_documents_do_not_leak():
    leaves, _, spec, _ = build((1000, 16, 4, 128, 16, 16, 0, 0), torch.bfloat16)
    docs = torch.zeros(2, 1000, dtype=torch.int32, device="cuda")
    docs[:, 333:] = 333
    docs[:, 700:] = 700
    changed = [x.detach().clone() for x in leaves]
    for x in changed:
        x[:, 333:700] = torch.rand_like(x[:, 333:700])
    for doc, same in ((None, slice(0, 333)), (docs, slice(0, 333)), (docs, slice(700, None))):
        for trunk in ("full", "sparse"):
            before, after = (
                kernels.ssa_attention(*x, spec, trunk=trunk, doc_starts=doc, backend="triton")[0][:, same]
                for x in (leaves, changed)
            )
            assert torch.equal(before, after)


def test_a_budget_of_everything_makes_both_streams_equal():
    leaves, _, _, options = build((1000, 8, 2, 64, 16, 63, 0, 0), torch.bfloat16)
    outputs = [
        kernels.ssa_attention(*leaves, BlockSpec(16, 63), trunk=trunk, **options, backend="triton")
        for trunk in ("full", "sparse")
    ]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert float(outputs[0][1]) == 0.0
