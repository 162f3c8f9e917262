"""The grid of the proof: head layouts, head sizes, block sizes, lengths to 8192, documents, places; and one call of each.

Importable by the processes that compile its kernels before the tests begin (`conftest.py`).
"""

import torch

import ssa_kernels
from ssa_kernels import BlockSpec
from ssa_kernels.reference import accuracy, masked

from ...kernels.support import documents, inputs, places

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
    (8192, 32, 2, 64, 16, 16, 0, 0),
    (8192, 32, 2, 64, 16, 16, 3000, 0),
    (8192, 8, 8, 128, 16, 16, 1000, 0),
]
EVERY = [(case, torch.bfloat16) for case in CASES]
SOME = [(case, dtype) for dtype in (torch.float16, torch.float32) for case in CASES[3:19:5]]
GRID = EVERY + SOME
WIDTH = 100
LOSS = 100.0


def build(case, dtype, sharpness=1.0):
    """([q, k, v, gate], upstream, spec, {doc_starts, query_index}); long rows come one at a time, others in pairs."""
    n, h_q, h_kv, dim, size, count, mean_length, rows = case
    batch = 1 if n > 4000 else 2
    leaves, upstream = inputs(batch, n, h_q, h_kv, dim, n_q=rows or None)
    leaves[0] = leaves[0].detach() * sharpness
    leaves = [x.detach().to("cuda", dtype).requires_grad_() for x in leaves]
    docs = documents(batch, n, mean_length).cuda() if mean_length else None
    index = places(n, rows).cuda() if rows else None
    return leaves, upstream.to("cuda", dtype), BlockSpec(size, count), {"doc_starts": docs, "query_index": index}


def streams(case, dtype) -> tuple[str, ...]:
    """nsa's two are the same dense kernels with two more masks: in a third of the bf16 cases, and all others."""
    more = CASES.index(case) % 3 == 0 or dtype != torch.bfloat16
    return ("full", "sparse", "ssa", "window", "compressed") if more else ("full", "sparse", "ssa")


def call(name, leaves, spec, options, blocks, trunk="full"):
    q, k, v, gate = leaves
    options = {**options, "backend": "triton"}
    if name == "ssa":
        return ssa_kernels.ssa_attention(q, k, v, gate, spec, trunk=trunk, **options)
    if name == "sparse":
        return ssa_kernels.sparse_attention(q, k, v, spec, blocks=blocks, **options)
    extra = {"full": (), "window": (WIDTH,), "compressed": (spec,)}[name]
    return getattr(ssa_kernels, f"{name}_attention")(q, k, v, *extra, **options)


def loss_weight(upstream) -> float:
    return LOSS * upstream.numel() ** 0.5


def run(leaves, upstream, spec, options, names, trunk="full"):
    """(blocks, {stream: (outputs, gradients)}) of our kernels."""
    blocks = ssa_kernels.select_blocks(*leaves[:2], spec, **options, backend="triton")
    weight = loss_weight(upstream)
    return blocks, {
        name: masked.results(
            lambda name=name: call(name, leaves, spec, options, blocks, trunk), leaves, upstream, weight
        )
        for name in names
    }


def check_selection(blocks, leaves, spec, options) -> None:
    q, k = leaves[:2]
    judged = accuracy.selection(blocks, q, k, masked.Masks(q, k, spec, *options.values()), q.shape[3] ** -0.5)
    assert int(judged.malformed) == 0
    assert float(judged.gap) <= 1.0, f"a block {float(judged.gap):.1f} ties worse than one left out"


def compile_case(case, dtype) -> None:
    leaves, upstream, spec, options = build(case, dtype)
    for trunk in ("full", "sparse"):
        run(leaves, upstream, spec, options, streams(case, dtype) if trunk == "full" else ("ssa",), trunk)
    torch.cuda.synchronize()
