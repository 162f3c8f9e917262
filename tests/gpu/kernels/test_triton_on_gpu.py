"""The Triton kernels against fp64 on the GPU: lengths, head layouts, head sizes, block sizes, documents, places, odd logits.

Tolerances are norms relative to fp64: outputs 5e-3, gradients 1e-2 (half precision); fp32 inputs 2e-5. Selections must be the
fp64 ones except where scores tie within 1e-5. Outputs of every kernel start as NaN (`torch.utils.deterministic.fill_...`).
"""

import pytest
import torch

import kernels
from kernels import BlockSpec, oracle, torch_backend

from ...kernels.support import documents, inputs, places, relative_error

pytestmark = pytest.mark.gpu

# n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none), query rows (0 = all)
CASES = [
    (1, 16, 1, 64, 16, 16, 0, 0),
    (15, 4, 4, 64, 16, 4, 0, 0),
    (16, 8, 2, 128, 16, 4, 0, 0),
    (17, 16, 1, 64, 16, 2, 5, 0),
    (63, 2, 1, 64, 32, 2, 0, 0),
    (100, 32, 2, 64, 16, 4, 30, 0),
    (129, 8, 1, 128, 16, 4, 0, 0),
    (129, 4, 4, 64, 16, 4, 1, 0),
    (1000, 32, 2, 64, 16, 16, 0, 0),
    (1000, 32, 1, 64, 16, 16, 300, 0),
    (1000, 8, 8, 128, 16, 16, 0, 0),
    (1000, 16, 4, 128, 64, 4, 400, 0),
    (1000, 8, 4, 64, 128, 3, 0, 0),
    (1000, 6, 2, 80, 16, 8, 200, 500),
    (2000, 32, 2, 64, 16, 16, 0, 700),
    (2000, 32, 2, 64, 16, 16, 700, 0),
    (2000, 32, 8, 128, 16, 16, 0, 0),
    (2000, 12, 2, 64, 32, 8, 0, 0),
    (2000, 16, 1, 32, 16, 64, 0, 0),
]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty returns NaN, so that an element no kernel wrote is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def build(case, dtype, sharpness=1.0):
    n, h_q, h_kv, dim, size, count, mean_length, rows = case
    leaves, upstream = inputs(2, n, h_q, h_kv, dim, n_q=rows or None)
    leaves = [
        (x.detach() * (sharpness if i == 0 else 1.0)).to("cuda", dtype).requires_grad_() for i, x in enumerate(leaves)
    ]
    docs = documents(2, n, mean_length).cuda() if mean_length else None
    index = places(n, rows).cuda() if rows else None
    return leaves, upstream.to("cuda", dtype), BlockSpec(size, count), {"doc_starts": docs, "query_index": index}


def exact(leaves):
    return [x.detach().double().requires_grad_() for x in leaves]


def graded(result, upstream, leaves, weight=100.0):
    results = result if isinstance(result, tuple) else (result,)
    total = (results[0].double() * upstream.double()).sum()
    if len(results) > 1:
        total = total + weight * results[1].double() * upstream.numel() ** 0.5
    return results, torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def compare(got, expected, dtype, name):
    loose = dtype != torch.float32
    limits = (5e-3, 1e-2) if loose else (2e-5, 2e-5)
    for kind, limit, ours, truth in zip(("output", "gradient"), limits, got, expected, strict=True):
        for i, (a, b) in enumerate(zip(ours, truth, strict=True)):
            assert torch.isfinite(a).all(), f"{name} {kind} {i}: not finite"
            error = relative_error(a, b)
            assert error <= limit, f"{name} {kind} {i}: off by {error:.2e}, allowed {limit:.0e}"


def check_selection(blocks, leaves, spec, options):
    q, k = (x.detach().double() for x in leaves[:2])
    scale = q.shape[3] ** -0.5
    expected = kernels.select_blocks(q, k, spec, **options, backend="torch")
    assert torch.equal(blocks[..., 0], expected[..., 0])
    assert torch.equal((blocks >= 0).sum(-1), (expected >= 0).sum(-1))
    wrong = (blocks != expected).any(-1).nonzero().tolist()
    assert len(wrong) <= 0.02 * blocks[..., 0].numel() + 1
    for b, row, h in wrong[:40]:
        t = row if options["query_index"] is None else int(options["query_index"][row])
        start = 0 if options["doc_starts"] is None else int(options["doc_starts"][b, t])
        kbar = oracle.pooled(k, b, start, t + 1, spec.block_size)
        score = oracle.block_scores(q[b, row], kbar, scale)[h]
        ours, truth = set(blocks[b, row, h].tolist()), set(expected[b, row, h].tolist())
        assert len(ours) == len(truth)
        for mine in ours - truth:
            assert score[list(truth - ours)].max() - score[mine] < 1e-5


EVERY = [(case, torch.bfloat16) for case in CASES]
SOME = [(case, dtype) for dtype in (torch.float16, torch.float32) for case in CASES[3::5]]


@pytest.mark.parametrize(("case", "dtype"), EVERY + SOME, ids=str)
def test_every_stream_matches_fp64(case, dtype):
    leaves, upstream, spec, options = build(case, dtype)
    scale = leaves[0].shape[3] ** -0.5
    blocks = kernels.select_blocks(*leaves[:2], spec, **options, backend="triton")
    check_selection(blocks, leaves, spec, options)
    streams = {"full_attention": (), "sparse_attention": (spec,)}
    if CASES.index(case) % 3 == 0 or dtype != torch.bfloat16:  # nsa's: the same dense kernels, two more masks
        streams |= {"window_attention": (100,), "compressed_attention": (spec,)}
    for name, extra in streams.items():
        function = getattr(kernels, name)
        given = {**options, "blocks": blocks} if name == "sparse_attention" else options
        truth = exact(leaves)
        got = graded(function(*leaves[:3], *extra, **given, backend="triton"), upstream, leaves[:3])
        expected = graded(function(*truth[:3], *extra, **given, backend="torch"), upstream, truth[:3])
        compare(got, expected, dtype, name)
    for trunk in ("full", "sparse"):
        truth = exact(leaves)
        got = graded(kernels.ssa_attention(*leaves, spec, trunk=trunk, **options, backend="triton"), upstream, leaves)
        stream = torch_backend.Stream("both", block_size=spec.block_size)
        geometry = torch_backend.Geometry(*truth[:2], stream, *options.values(), blocks)
        expected = torch_backend._TwoStreams.apply(*truth, geometry, scale, trunk)
        compare(got, graded(expected, upstream, truth), dtype, f"ssa {trunk}")


def test_no_gradient_crosses_a_document():
    """A document's outputs and gradients are those it has alone in a row, to the last rounding of bf16."""
    leaves, upstream, _, _ = build((1000, 32, 2, 64, 16, 16, 0, 0), torch.bfloat16)
    docs = torch.zeros(2, 1000, dtype=torch.int32, device="cuda")
    docs[:, 320:] = 320
    alone = [x.detach()[:, :320].contiguous().requires_grad_() for x in leaves[:3]]
    results = []
    for x, doc, up in ((leaves[:3], docs, upstream), (alone, docs[:, :320], upstream[:, :320])):
        out = kernels.full_attention(*x, doc_starts=doc.contiguous(), backend="triton")
        grads = torch.autograd.grad(out, x, up.contiguous())
        results.append([y[:, :320] for y in (out, *grads)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 2e-3


@pytest.mark.parametrize("sharpness", [4.0, 16.0])
def test_sharp_logits(sharpness):
    leaves, upstream, spec, options = build((1000, 32, 2, 64, 16, 16, 0, 0), torch.bfloat16, sharpness)
    blocks = kernels.select_blocks(*leaves[:2], spec, **options, backend="triton")
    truth = exact(leaves)
    got = graded(kernels.sparse_attention(*leaves[:3], spec, blocks=blocks, backend="triton"), upstream, leaves[:3])
    want = graded(kernels.sparse_attention(*truth[:3], spec, blocks=blocks, backend="torch"), upstream, truth[:3])
    compare(got, want, torch.bfloat16, "sparse")


def test_two_runs_are_bit_identical():
    leaves, upstream, spec, options = build((2000, 32, 2, 64, 16, 16, 700, 0), torch.bfloat16)
    runs = []
    for _ in range(2):
        result = kernels.ssa_attention(*leaves, spec, trunk="sparse", **options, backend="triton")
        results, gradients = graded(result, upstream, leaves)
        runs.append([*results, *gradients])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_future_and_other_documents_do_not_leak():
    leaves, _, spec, _ = build((1000, 32, 2, 64, 16, 16, 0, 0), torch.bfloat16)
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


def test_statistics_on_the_gpu_match_fp64():
    leaves, _, spec, options = build((1000, 32, 2, 64, 16, 8, 300, 0), torch.bfloat16)
    ours = kernels.attention_statistics(*leaves[:2], spec, **options)
    truth = kernels.attention_statistics(*exact(leaves)[:2], spec, **options, backend="torch")
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, truth, strict=True))


def test_authors_selection_matches_the_torch_backend():
    leaves, _, _, _ = build((1500, 32, 2, 64, 16, 16, 0, 0), torch.float32)
    docs = documents(2, 1500, 600, seed=3).cuda()
    for doc in (None, docs):
        ours, theirs = (
            kernels.select_blocks(*leaves[:2], BlockSpec(topk="authors"), doc_starts=doc, backend=b)
            for b in ("triton", "torch")
        )
        assert (ours != theirs).any(-1).float().mean() < 1e-3
