"""Inputs and comparisons shared by the kernel tests: seeded, small, and packed into documents where asked.

Every comparison states a tolerance as an error norm relative to the oracle's.
It refuses to compare gradients that do not exist.
"""

import torch

import ssa_kernels
from ssa_kernels import BlockSpec
from ssa_kernels.reference import oracle


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs(batch, n, h_q, h_kv, dim, *, n_q=None, seed=0, dtype=torch.float32, grad=True):
    """q, k, v, gate and an upstream gradient."""
    gen = generator(seed)
    rows = n if n_q is None else n_q
    q = torch.randn(batch, rows, h_q, dim, generator=gen, dtype=torch.float64)
    k, v = (torch.randn(batch, n, h_kv, dim, generator=gen, dtype=torch.float64) for _ in range(2))
    gate = torch.rand(batch, rows, h_q, generator=gen, dtype=torch.float64)
    upstream = torch.randn(q.shape, generator=gen, dtype=torch.float64).to(dtype)
    return [x.to(dtype).requires_grad_(grad) for x in (q, k, v, gate)], upstream


def documents(batch: int, n: int, mean_length: int, seed: int = 0) -> torch.Tensor:
    """Random packed documents, int32 [B, N]; mean_length 1 makes every token a document."""
    cut = torch.rand(batch, n, generator=generator(seed)) < 1.0 / mean_length
    cut[:, 0] = True
    return torch.where(cut, torch.arange(n), 0).cummax(1).values.int()


def places(n: int, rows: int, seed: int = 0) -> torch.Tensor:
    """A query_index of `rows` distinct places, in no order."""
    return torch.randperm(n, generator=generator(seed))[:rows].int()


def outputs_and_gradients(result, upstream, leaves, loss_weight=3.0):
    """[outputs..., gradients...] of one call; a tuple result is (output, alignment loss)."""
    results = result if isinstance(result, tuple) else (result,)
    total = (results[0] * upstream).sum()
    if len(results) > 1:
        total = total + loss_weight * results[1] * results[0].numel()
    if not total.requires_grad:
        return [*results, *(torch.zeros_like(x) for x in leaves)]
    return [*results, *torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)]


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the error over the norm of the truth; where the truth is zero (a document of one token) over one per
    element."""
    got, expected = got.detach().double(), expected.detach().double()
    size, unit = expected.norm(), expected.numel() ** 0.5
    return float((got - expected).norm() / (size if size > 1e-6 * unit else unit))


def assert_close(got, expected, tolerance, what=""):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.isfinite(a).all(), f"{what}: item {i} is not finite"
        error = relative_error(a, b)
        assert error <= tolerance, f"{what}: item {i} is off by {error:.2e}, allowed {tolerance:.0e}"


def assert_same_selection(blocks, q, k, spec, doc_starts=None, query_index=None):
    """Selections are those of fp64, except that blocks whose scores tie within 1e-5 may stand in for each other."""
    q, k = q.detach().double(), k.detach().double()
    options = {"doc_starts": doc_starts, "query_index": query_index}
    expected = ssa_kernels.select_blocks(q, k, spec, **options, backend="torch")
    assert torch.equal(blocks[..., 0], expected[..., 0])
    assert torch.equal((blocks >= 0).sum(-1), (expected >= 0).sum(-1))
    huge = torch.where(blocks < 0, 1 << 30, blocks)[..., 1:]
    assert (huge.diff(dim=-1) > 0).logical_or(huge[..., 1:] == 1 << 30).all(), "not in ascending order"
    wrong = (blocks != expected).any(-1).nonzero().tolist()
    assert len(wrong) <= 0.02 * blocks[..., 0].numel() + 1
    for b, row, h in wrong[:40]:
        t = row if query_index is None else int(query_index[row])
        start = 0 if doc_starts is None else int(doc_starts[b, t])
        kbar = oracle.pooled(k, b, start, t + 1, spec.block_size)
        score = oracle.block_scores(q[b, row], kbar, q.shape[3] ** -0.5)[h]
        ours, truth = set(blocks[b, row, h].tolist()), set(expected[b, row, h].tolist())
        for mine in ours - truth:
            assert score[list(truth - ours)].max() - score[mine] < 1e-5


SPEC = BlockSpec(16, 3)
