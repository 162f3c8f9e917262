"""Cached attention on the GPU against fp64 attention over the whole sequence, row by row.

Tolerances as everywhere (`ssa_kernels.reference.accuracy`):
output norms within 5e-3 in half precision and 2e-5 in fp32; selections are
fp64's except where scores tie within 1e-5. Caches start as NaN.
"""

import pytest
import torch

import ssa_kernels
from ssa_kernels import BlockSpec, cached_attention, cached_blocks

from ...kernels.cached import fill, make_cache, sequences, step
from ...kernels.support import relative_error
from .grid import check_selection

pytestmark = pytest.mark.gpu

# lengths, Hq, Hkv, D, block_size, block_count, tokens a step
CASES = [
    ([1, 15, 16, 17, 100], 16, 1, 64, 16, 4, 1),
    ([1000, 999, 17, 512], 32, 2, 64, 16, 16, 1),
    ([1000, 33, 640], 32, 8, 128, 16, 8, 1),
    ([1000, 257], 4, 4, 64, 16, 16, 3),
    ([700, 301], 4, 2, 80, 32, 4, 16),
    ([1000, 999], 6, 2, 64, 64, 3, 1),
    ([1500, 400], 32, 2, 64, 16, 60, 1),
    ([2000, 1999], 16, 1, 64, 16, 80, 2),
    ([12000, 9000, 70], 32, 2, 64, 16, 16, 1),
    ([40000], 16, 1, 64, 16, 16, 2),
]
EVERY = [(case, torch.bfloat16) for case in CASES] + [(CASES[1], t) for t in (torch.float16, torch.float32)]


def held(case, dtype, paged, page=32):
    lengths, h_q, h_kv, dim, size, count, tokens = case
    data = sequences([n + tokens for n in lengths], h_q, h_kv, dim, dtype=dtype, device="cuda")
    cache = make_cache(
        paged,
        len(lengths),
        max(lengths) + max(20, tokens),
        h_kv,
        dim,
        block_size=size,
        dtype=dtype,
        device="cuda",
        page=page,
    )
    fill(cache, data, lengths)
    return data, cache, BlockSpec(size, count)


def truth(x, tokens, spec, mode, blocks):
    q, k, v = (y.double() for y in x)
    index = torch.arange(k.shape[1] - tokens, k.shape[1], dtype=torch.int32, device="cuda")
    options = {"query_index": index, "backend": "torch"}
    if mode == "full":
        return ssa_kernels.full_attention(q[:, -tokens:], k, v, **options)
    return ssa_kernels.sparse_attention(q[:, -tokens:], k, v, spec, blocks=blocks, **options)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize(("case", "dtype"), EVERY, ids=str)
def test_decode_matches_fp64(case, dtype, paged):
    data, cache, spec = held(case, dtype, paged)
    tokens = case[-1]
    q = step(cache, data, tokens)
    assert cache.lengths.tolist() == cache.host_lengths == [n + tokens for n in case[0]]
    blocks = cached_blocks(q, cache, spec)
    out = {mode: cached_attention(q, cache, spec, mode=mode) for mode in ("sparse", "full")}
    limit = 2e-5 if dtype == torch.float32 else 5e-3
    for b, x in enumerate(data):
        index = torch.arange(x[0].shape[1] - tokens, x[0].shape[1], dtype=torch.int32, device="cuda")
        check_selection(blocks[b : b + 1], [x[0][:, -tokens:], x[1]], spec, {"doc_starts": None, "query_index": index})
        for mode, got in out.items():
            assert torch.isfinite(got[b]).all()
            error = relative_error(got[b : b + 1], truth(x, tokens, spec, mode, blocks[b : b + 1]))
            assert error <= limit, f"{mode}, sequence {b}: off by {error:.2e}"


def test_step_after_step_stays_true():
    """Fifty steps cross several block ends: pooled keys are written by the append kernel and then read."""
    case = ([300, 285, 31], 32, 2, 64, 16, 4, 50)
    data, cache, spec = held(case, torch.bfloat16, True)
    for _ in range(50):
        q = step(cache, data, 1)
        blocks = cached_blocks(q, cache, spec)
        out = cached_attention(q, cache, spec)
        for b, n in enumerate(cache.host_lengths):
            x = [y[:, :n] for y in data[b]]
            index = torch.tensor([n - 1], dtype=torch.int32, device="cuda")
            check_selection(blocks[b : b + 1], [x[0][:, -1:], x[1]], spec, {"doc_starts": None, "query_index": index})
            assert relative_error(out[b : b + 1], truth(x, 1, spec, "sparse", blocks[b : b + 1])) <= 5e-3


@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_shuffled_pages_change_no_bit(mode):
    results = []  # 1020 tokens of room and 64 pages of 16 are split alike
    for paged in (False, True):
        data, cache, spec = held(CASES[1], torch.bfloat16, paged, page=16)
        results.append(cached_attention(step(cache, data, 1), cache, spec, mode=mode))
    assert torch.equal(*results)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_chunked_prefill_matches_fp64(mode, paged):
    lengths, spec = [1000, 700, 41], BlockSpec(16, 8)
    data = sequences(lengths, 32, 2, 64, dtype=torch.bfloat16, device="cuda")
    cache = make_cache(paged, 3, 1024, 2, 64, dtype=torch.bfloat16, device="cuda")
    for upto in (300, 556, 1000):
        before = cache.host_lengths
        fill(cache, data, [min(n, upto) for n in lengths])
        counts = [n - max(0, m) for n, m in zip(cache.host_lengths, before, strict=True)]
        q = torch.zeros(3, max(counts), 32, 64, dtype=torch.bfloat16, device="cuda")
        for b, c in enumerate(counts):
            q[b, q.shape[1] - c :] = data[b][0][:, cache.host_lengths[b] - c : cache.host_lengths[b]]
        out = cached_attention(q, cache, spec, mode=mode)
        for b, c in enumerate(counts):
            if c:
                x = [y[:, : cache.host_lengths[b]] for y in data[b]]
                index = torch.arange(cache.host_lengths[b] - c, cache.host_lengths[b], dtype=torch.int32, device="cuda")
                blocks = ssa_kernels.select_blocks(x[0][:, -c:], x[1], spec, query_index=index)
                expected = truth(x, c, spec, mode, blocks)
                assert relative_error(out[b : b + 1, out.shape[1] - c :], expected) <= 5e-3


@pytest.mark.parametrize("capacity", [1024, 20000])
@pytest.mark.parametrize("mode", ["sparse", "full"])
def test_a_cuda_graph_replays_growing_sequences(mode, capacity):
    spec, lengths = BlockSpec(16, 8), [600, 31]
    data = sequences([n + 40 for n in lengths], 32, 2, 64, dtype=torch.bfloat16, device="cuda")
    caches = [make_cache(True, 2, capacity, 2, 64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    for cache in caches:
        fill(cache, data, lengths)
    q, k, v = (torch.zeros(2, 1, h, 64, dtype=torch.bfloat16, device="cuda") for h in (32, 2, 2))
    cached_attention(q, caches[0], spec, mode=mode)  # compile before capture
    warm = make_cache(True, 2, capacity, 2, 64, dtype=torch.bfloat16, device="cuda")
    warm.append(k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        caches[0].append(k, v)
        out = cached_attention(q, caches[0], spec, mode=mode)
    assert caches[0].host_lengths == lengths
    for i in range(40):
        for place, which in ((q, 0), (k, 1), (v, 2)):
            place.copy_(torch.cat([data[b][which][:, n + i : n + i + 1] for b, n in enumerate(lengths)]))
        caches[0].reserve(1)
        graph.replay()
        assert torch.equal(out, cached_attention(step(caches[1], data, 1), caches[1], spec, mode=mode))
    assert caches[0].lengths.tolist() == caches[0].host_lengths == [640, 71]


def test_two_runs_are_bit_identical():
    data, cache, spec = held(CASES[8], torch.bfloat16, False)
    q = step(cache, data, 1)
    for mode in ("sparse", "full"):
        runs = [cached_attention(q, cache, spec, mode=mode) for _ in range(3)]
        assert torch.equal(runs[0], runs[1])
        assert torch.equal(runs[0], runs[2])
