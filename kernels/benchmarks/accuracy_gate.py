"""The benchmark's gate: the very call that will be timed, judged on a sample of its rows against fp64.

The sample is the last rows of the last batch row (whose keys no other query sees, so their dK and dV are whole) and random rows
before them; the tolerances are `accuracy`'s. A row that fails is reported as failed, whatever its time.
"""

import torch

from benchmarks.cases import SPEC, Contender, Sample
from ssa_kernels.reference import accuracy, masked
from ssa_kernels.spec import BlockSpec

MOST = 1 << 27  # elements of a sampled score matrix: 1 GB in fp64
DTYPE = torch.bfloat16


def judge(contender: Contender, sample: Sample) -> str:
    """ "" where every sampled element is within tolerance, else the worst offence."""
    batch, n, h_q, _, dim = sample.shape
    tail = min(n, max(8, MOST // (2 * n * h_q)))
    earlier = torch.randperm(max(1, n - tail), device="cuda")[:tail].sort().values
    rows = (
        torch.cat([earlier, torch.arange(n - tail, n, device="cuda")]) if n > tail else torch.arange(n, device="cuda")
    )
    b, docs = slice(batch - 1, batch), sample.documents[contender.docs]
    docs = None if docs is None else docs[b]
    q, k, v, gate = (x.detach() for x in sample.leaves)
    leaves, upstream = [q[b, rows], k[b], v[b], gate[b, rows]], sample.upstream[b, rows]
    masks = masked.Masks(*leaves[:2], BlockSpec(*SPEC), docs, rows.int())
    blocks = sample.selected(contender.docs)[b, rows]
    if contender.truth == "select":
        chosen = accuracy.selection(contender.call(*sample.leaves)[b, rows], *leaves[:2], masks, dim**-0.5)
        malformed, gap = int(chosen.malformed), float(chosen.gap)
        return f"{malformed} malformed rows, gap {gap:.2g} ties" if malformed or gap > 1 else ""
    weight = 0.1 * q.numel()
    fixed = upstream, masks, blocks, dim**-0.5, weight
    kinds = {"trunk": contender.trunk, "count": q.numel()}
    got = _call(contender, sample, weight)
    mine = _part(got, rows, tail, b)
    name, inputs = contender.truth, (leaves, *fixed)
    truth = _cut(masked.reference((name,), *inputs, torch.float64, **kinds)[name], tail, contender)
    own = masked.yardsticks((name,), *inputs, dtype=DTYPE, **kinds)[name]
    own = [_cut(x, tail, contender) for x in own]
    found = accuracy.verdicts(accuracy.errors(contender.what, mine, truth, own, DTYPE))
    failed = [v for v in found if v.failed]
    return max(failed, key=lambda v: max(v.of_norm, v.of_worst)).text if failed else ""


def _call(contender: Contender, sample: Sample, weight: float):
    if contender.backward:
        outputs, grads = masked.results(lambda: contender.call(*sample.leaves), sample.leaves, sample.upstream, weight)
        return outputs[:1], grads
    with torch.no_grad():
        return [contender.call(*sample.leaves)], []


def _part(got, rows, tail: int, b: slice):
    """The sampled rows of output, dq and dgate; the last keys of dk and dv. (The loss is a mean over rows not sampled.)"""
    outputs, grads = got
    kept = [x[b, -tail:] if i in (1, 2) else x[b, rows] for i, x in enumerate(grads)]
    return [x[b, rows].detach() for x in outputs], kept


def _cut(reference, tail: int, contender: Contender):
    outputs, grads = reference
    kept = [x[:, -tail:] if i in (1, 2) else x for i, x in enumerate(grads)]
    return outputs[:1], kept if contender.backward else []
