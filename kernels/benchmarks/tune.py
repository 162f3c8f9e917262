"""Times every kernel over its candidate tiles, one shape at a time: where the rows of `triton_config.TABLE` come from.

Run by hand on the target GPU (`python -m benchmarks.tune`), read, and copy the winners; nothing reads its output.
It refuses to run without a CUDA device.
"""

import argparse
import itertools

import torch
import triton

from ssa_kernels.spec import BlockSpec
from ssa_kernels.triton import dense as triton_dense
from ssa_kernels.triton import dense_backward as triton_dense_backward
from ssa_kernels.triton import dual as triton_dual
from ssa_kernels.triton import dual_backward as triton_dual_backward
from ssa_kernels.triton import gate as triton_gate
from ssa_kernels.triton import routing as triton_routing
from ssa_kernels.triton import sparse as triton_sparse
from ssa_kernels.triton.tiles import choose

SHAPES = {
    "A8k4": (4, 8192, 32, 2, 64),
    "A32k": (1, 32768, 32, 2, 64),
    "B8k": (1, 8192, 32, 8, 128),
    "C8k": (1, 8192, 32, 32, 128),
}


def milliseconds(function, rep=30) -> float:
    return triton.testing.do_bench(function, warmup=5, rep=rep, return_mode="median")


def sweep(name: str, base, fields: dict, run) -> None:
    results = []
    for values in itertools.product(*fields.values()):
        config = base._replace(**dict(zip(fields, values, strict=True)))
        try:
            results.append((milliseconds(lambda c=config: run(c)), values))
        except Exception as problem:  # a tile that does not fit is a result of its own
            print(f"  {name} {values}: {type(problem).__name__}")
    for time, values in sorted(results, key=lambda r: r[0])[:6]:
        print(f"  {name:14s} {time:8.3f} ms  {values}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=["A8k4"])
    parser.add_argument(
        "--kernel", nargs="+", default=["select", "stat", "forward", "dq", "dkv", "gate", "index", "dense", "dual"]
    )
    arguments = parser.parse_args()
    for shape in arguments.shape:
        tune(shape, arguments.kernel)


def tune(shape: str, wanted: list[str]) -> None:
    batch, n, h_q, h_kv, dim = SHAPES[shape]
    print(shape, SHAPES[shape])
    q, do = (torch.randn(batch, n, h_q, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    k, v = (torch.randn(batch, n, h_kv, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gate = torch.rand(batch, n, h_q, device="cuda", dtype=torch.bfloat16)
    spec, base, scale = BlockSpec(), choose(q), dim**-0.5
    blocks = triton_routing.select_blocks(q, k, spec, scale, None, None, base)
    o, lse = triton_sparse.forward(q, k, v, blocks, 16, scale, None, None, base)
    delta = triton_gate.row_delta(o, do, 64)
    index = triton_sparse.inverse_index(blocks, n, 16, None, None)
    one = torch.ones((), device="cuda")

    def routing(c):
        triton_routing.select_blocks(q, k, spec, scale, None, None, c)

    def sparse_q(c):
        triton_sparse.backward_q(q, k, v, blocks, lse, do, delta, 16, scale, None, None, c)

    def sparse_kv(c):
        triton_sparse.backward_kv(q, k, v, index, lse, do, delta, 16, 16, scale, None, c)

    def both_gates(c):
        triton_gate.gate_forward(o, do, gate, "full", o.numel(), c.gate_rows)
        triton_gate.gate_backward(o, do, gate, q, one, "full", o.numel(), c.gate_rows)

    if "select" in wanted:
        tile = "select_tile" if h_q == h_kv else "insert_tile"
        tiles = {"select_rows": (64, 128), tile: (32, 64, 128), "select_warps": (4, 8)}
        sweep("routing", base, tiles | {"select_registers": (None, 168, 128)}, routing)
        sweep("routing", base, {"select_stages": (2, 3, 4), "select_programs": (2, 3, 4, 6)}, routing)
    if "stat" in wanted:
        tiles = {"stat_rows": (64, 128, 256), "stat_tile": (64, 128), "stat_warps": (4, 8)}
        sweep("routing", base, tiles | {"stat_stages": (2, 3), "stat_registers": (None, 128)}, routing)
    if "forward" in wanted:
        fields = {"sparse_keys": (32, 64, 128, 256), "sparse_warps": (1, 2, 4), "sparse_stages": (1, 2, 3)}
        sweep(
            "sparse forward", base, fields,
            lambda c: triton_sparse.forward(q, k, v, blocks, 16, scale, None, None, c),
        )  # fmt: skip
    if "dq" in wanted:
        fields = {"dq_keys": (32, 64, 128, 256), "dq_warps": (1, 2, 4), "dq_stages": (1, 2, 3)}
        sweep("sparse dq", base, fields, sparse_q)
    if "dkv" in wanted:
        fields = {"dkv_rows": (32, 64, 128), "dkv_warps": (1, 2, 4), "dkv_stages": (1, 2, 3)}
        sweep("sparse dkv", base, fields, sparse_kv)
    if "index" in wanted:
        print(
            f"  inverse index  {milliseconds(lambda: triton_sparse.inverse_index(blocks, n, 16, None, None)):8.3f} ms"
        )
    if "gate" in wanted:
        sweep("gate both ways", base, {"gate_rows": (16, 32, 64, 128)}, both_gates)
    if "dense" in wanted:
        tune_dense(q, k, v, do, scale, base)
    if "dual" in wanted:
        tune_dual(q, k, v, do, blocks, scale, base)


def tune_dense(q, k, v, do, scale: float, base) -> None:
    """Without documents and with one, whose tiles should cost the same."""
    n = q.shape[1]
    one = torch.zeros(q.shape[0], n, dtype=torch.int32, device="cuda")
    tiles = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 2), (64, 128, 4, 3), (32, 64, 4, 3)]
    tiles += [(64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4), (128, 128, 8, 2)]
    for name, dense in {"": triton_dense.Dense(n), ", document": triton_dense.Dense(n, doc_starts=one)}.items():
        o, lse = triton_dense.forward(q, k, v, scale, dense, base)
        delta = triton_dense_backward.by_head(triton_gate.row_delta(o, do, base.gate_rows))
        given = lse, do, delta, scale, dense

        def forward(c, dense=dense):
            triton_dense.forward(q, k, v, scale, dense, c)

        def queries(c, given=given):
            triton_dense_backward.backward_q(q, k, v, *given, c)

        def keys(c, given=given):
            triton_dense_backward.backward_kv(q, k, v, *given, c)

        sweep("dense forward" + name, base, {"dense_forward": tiles}, forward)
        sweep("dense dq" + name, base, {"dense_dq": tiles}, queries)
        sweep("dense dkv" + name, base, {"dense_dkv": tiles}, keys)


def tune_dual(q, k, v, do, blocks, scale: float, base) -> None:
    n = q.shape[1]
    tiles = [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)]
    bits = triton_dual.selection_bits(blocks, n, 16, None)
    full, lse_full, sparse, lse = triton_dual.forward(q, k, v, *bits, 16, scale, None, base)
    deltas = [triton_gate.row_delta(x, do, base.gate_rows) for x in (full, sparse)]
    given = blocks, 16, scale, None, do, do, lse_full, lse, *deltas
    sweep(
        "dual forward", base, {"dual_forward": tiles},
        lambda c: triton_dual.forward(q, k, v, *bits, 16, scale, None, c),
    )  # fmt: skip
    sweep("dual dq", base, {"dual_dq": tiles}, lambda c: triton_dual_backward.backward_q(q, k, v, *given, c))


if __name__ == "__main__":
    main()
