"""What must hold bit for bit, or at sizes no reference covers: repeatability, no leaks, equal streams, 64-bit offsets.

Exact comparisons; the few that are not judge by `ssa_kernels.reference.accuracy`.
"""

import pytest
import torch

import ssa_kernels
from ssa_kernels import BlockSpec
from ssa_kernels.reference import accuracy, masked
from ssa_kernels.triton import gate as triton_gate

from ...kernels.support import documents, relative_error
from .grid import CASES, build, call, check_selection, loss_weight, run

pytestmark = pytest.mark.gpu
PLAIN, PACKED = CASES[8], CASES[15]


@pytest.mark.parametrize("case", [PLAIN, PACKED, CASES[16], CASES[10]], ids=str)
def test_two_runs_are_bit_identical_in_deterministic_mode(case):
    """Also under `warn_only`, which this folder's fixture sets, and in which PyTorch's own flash attention is not."""
    leaves, upstream, spec, options = build(case, torch.bfloat16)
    runs = []
    for _ in range(2):
        blocks, got = run(leaves, upstream, spec, options, ("full", "sparse", "ssa"), "sparse")
        runs.append([blocks, *(x for outputs, gradients in got.values() for x in (*outputs, *gradients))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def everything(leaves, upstream, spec, docs):
    """Selections, outputs and gradients [B, N, ...] of a loss that sees only `upstream` (no alignment loss: it sees all).

    Without documents less dk and dv: their sums run over later queries too, grouped by what those selected.
    """
    options = {"doc_starts": docs, "query_index": None}
    blocks, got = run(leaves, upstream, spec, options, ("full", "sparse", "window", "compressed"))
    for trunk in ("full", "sparse"):
        got[trunk + " ssa"] = masked.results(
            lambda trunk=trunk: call("ssa", leaves, spec, options, blocks, trunk), leaves, upstream, 0.0
        )
    kept = [[outputs[0], *(gradients if docs is not None else gradients[::3])] for outputs, gradients in got.values()]
    return [blocks, *(x for some in kept for x in some)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", [PLAIN, CASES[10]], ids=str)
def test_future_and_other_documents_do_not_leak(case, packed):
    leaves, upstream, spec, _ = build(case, torch.bfloat16)
    upstream[:, 333:700] = 0
    docs = torch.zeros(2, 1000, dtype=torch.int32, device="cuda")
    docs[:, 333:] = 333
    docs[:, 700:] = 700
    if not packed:
        upstream[:, 700:] = 0  # so that gradients of the past see the past only
    changed = [x.detach().clone() for x in leaves]
    for x in changed:
        x[:, 333:700] = torch.rand_like(x[:, 333:700])
    changed = [x.requires_grad_() for x in changed]
    before, after = (everything(x, upstream, spec, docs if packed else None) for x in (leaves, changed))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :333], b[:, :333])
        assert not packed or torch.equal(a[:, 700:], b[:, 700:])


def test_no_gradient_crosses_a_document():
    """A document's outputs and gradients are those it has alone in a row, to the last rounding of bf16."""
    leaves, upstream, _, _ = build(PLAIN, torch.bfloat16)
    docs = torch.zeros(2, 1000, dtype=torch.int32, device="cuda")
    docs[:, 320:] = 320
    alone = [x.detach()[:, :320].contiguous().requires_grad_() for x in leaves[:3]]
    results = []
    for x, doc, up in ((leaves[:3], docs, upstream), (alone, docs[:, :320], upstream[:, :320])):
        out = ssa_kernels.full_attention(*x, doc_starts=doc.contiguous(), backend="triton")
        grads = torch.autograd.grad(out, x, up.contiguous())
        results.append([y[:, :320] for y in (out, *grads)])
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 2e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", [(500, 16, 1, 64, 16, 32, 0, 0), (500, 8, 2, 64, 32, 16, 200, 0)], ids=str)
def test_a_budget_of_the_whole_sequence_makes_sparse_equal_full(case, dtype):
    leaves, upstream, spec, options = build(case, dtype)
    _, got = run(leaves, upstream, spec, options, ("full", "sparse", "ssa"))
    limits = (5e-3, 1e-2) if dtype == torch.bfloat16 else (2e-5, 2e-5)
    for limit, full, sparse in zip(limits, got["full"], got["sparse"], strict=True):
        assert all(relative_error(a, b) <= limit for a, b in zip(sparse, full, strict=True))
    assert float(got["ssa"][0][1]) <= limits[0] ** 2  # SmoothL1 of streams that differ by rounding alone


def test_zero_trunk_gradient_sends_opposite_gradients_to_the_streams():
    leaves, upstream, spec, options = build(PLAIN, torch.float32)
    full, sparse = (
        function(*leaves[:3], *extra, **options).detach()
        for function, extra in ((ssa_kernels.full_attention, ()), (ssa_kernels.sparse_attention, (spec,)))
    )
    nothing, one = torch.zeros_like(upstream), torch.ones((), device="cuda")
    for trunk in ("full", "sparse"):
        do_full, do_sparse, *_ = triton_gate.gate_backward(
            full, sparse, leaves[3].detach(), nothing, one, trunk, full.numel(), 64
        )
        assert torch.equal(do_full, -do_sparse)
        assert do_full.any()
    # v enters both streams linearly and a softmax row sums to one, so opposite dO cancel in the sum of dv over all keys.
    loss = ssa_kernels.ssa_attention(*leaves, spec, trunk="full", **options)[1]
    dv = torch.autograd.grad(loss * loss_weight(upstream), leaves)[2]
    assert dv.sum(1).abs().max() < 1e-4 * dv.abs().sum(1).max()


def test_statistics_match_fp64():
    leaves, _, spec, options = build((1000, 32, 2, 64, 16, 8, 300, 0), torch.bfloat16)
    ours = ssa_kernels.attention_statistics(*leaves[:2], spec, **options)
    exact = [x.detach().double() for x in leaves[:2]]
    truth = ssa_kernels.attention_statistics(*exact, spec, **options, backend="torch")
    assert all(relative_error(a, b) < 1e-4 for a, b in zip(ours, truth, strict=True))


def test_the_authors_selection_is_the_authors():
    leaves, _, _, _ = build((1500, 32, 2, 64, 16, 16, 0, 0), torch.bfloat16)
    spec = BlockSpec(topk="reference")
    for docs in (None, documents(2, 1500, 600, seed=3).cuda()):
        blocks = ssa_kernels.select_blocks(*leaves[:2], spec, doc_starts=docs, backend="triton")
        check_selection(blocks, leaves, spec, {"doc_starts": docs, "query_index": None})


def test_more_than_two_to_the_31_elements():
    """Nine rows of 128k tokens: the last of them lies past every 32-bit offset. A sample of its rows is judged in fp64, and the
    gradients of its last keys, which no other query sees."""
    batch, n, h_q, h_kv, dim, spec = 9, 131072, 32, 2, 64, BlockSpec()
    torch.use_deterministic_algorithms(False)  # 5 GB tensors are not filled with NaN first
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(heads):
        return torch.randn(batch, n, heads, dim, device="cuda", dtype=torch.bfloat16, generator=rng)

    q, k, v, upstream = (
        normal(h_q).requires_grad_(),
        normal(h_kv).requires_grad_(),
        normal(h_kv).requires_grad_(),
        normal(h_q),
    )
    assert q.numel() > 2**31
    gate = torch.rand(batch, n, h_q, device="cuda", dtype=torch.bfloat16, generator=rng).requires_grad_()
    leaves, docs = [q, k, v, gate], torch.arange(n, device="cuda", dtype=torch.int32) // 2048 * 2048
    docs = docs.expand(batch, -1).contiguous()
    blocks = ssa_kernels.select_blocks(q, k, spec, doc_starts=docs)
    weight, tail = 0.1 * q.numel(), 64
    rows = torch.cat(
        [torch.randint(n - tail, (tail,), device="cuda", generator=rng), torch.arange(n - tail, n, device="cuda")]
    )
    part = [q[-1:, rows], k[-1:], v[-1:], gate[-1:, rows]]
    part = [x.detach() for x in part]
    masks = masked.Masks(*part[:2], spec, docs[-1:], rows.int())
    check_selection(blocks[-1:, rows], part, spec, {"doc_starts": docs[-1:], "query_index": rows.int()})
    fixed = part, upstream[-1:, rows], masks, blocks[-1:, rows], dim**-0.5, weight
    options, found = {"doc_starts": docs, "query_index": None}, []
    for name in ("sparse", "ssa"):
        outputs, grads = masked.results(
            lambda name=name: call(name, leaves, spec, options, blocks), leaves, upstream, weight
        )
        mine = [outputs[0][-1:, rows]], [x[-1:, -tail:] if i in (1, 2) else x[-1:, rows] for i, x in enumerate(grads)]
        del outputs, grads
        right = masked.reference((name,), *fixed, torch.float64, count=q.numel())[name]
        theirs = masked.yardsticks((name,), *fixed, dtype=torch.bfloat16, count=q.numel())[name]
        right, *theirs = [
            (o[:1], [x[:, -tail:] if i in (1, 2) else x for i, x in enumerate(g)]) for o, g in (right, *theirs)
        ]
        found += accuracy.errors(name, mine, right, theirs, torch.bfloat16)
    failed = [v.text for v in accuracy.verdicts(found) if v.failed]
    assert not failed, "\n".join(failed)
