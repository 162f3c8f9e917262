"""`python -m kernels.bench`: times SSA against the vendors' full attention, in one process, and appends to a dated CSV.

It measures and does not judge: tests/gpu/kernels must pass before a figure from here is believed, and what refuses a
shape is a row that says so. It refuses to run without a CUDA device.
"""

import argparse
import csv
import datetime
import subprocess
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

import kernels
from kernels import BlockSpec

SHAPES = {  # batch, tokens, Hq, Hkv, D
    "A 8k": (1, 8192, 32, 2, 64),
    "A 8k x4": (4, 8192, 32, 2, 64),
    "A 32k": (1, 32768, 32, 2, 64),
    "A 128k": (1, 131072, 32, 2, 64),
    "B 8k": (1, 8192, 32, 8, 128),
    "B 32k": (1, 32768, 32, 8, 128),
    "C 8k": (1, 8192, 32, 32, 128),
    "D 8k": (1, 8192, 64, 4, 128),
}
COLUMNS = (
    "date,device,torch,triton,commit,shape,what,selection,forward_ms,both_ms,tflops,to_cudnn,to_flash,peak_mib,note"
)


def median_ms(function, rep: int) -> float:
    return triton.testing.do_bench(function, warmup=rep // 4, rep=rep, return_mode="median")


def make(shape, selection: str):
    """Random inputs; `local` and `overlap` give keys that drift slowly, so that neighbours select alike."""
    batch, n, h_q, h_kv, dim = shape
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(heads):
        return torch.randn(batch, n, heads, dim, device="cuda", generator=gen)

    q, k, v, upstream = normal(h_q), normal(h_kv), normal(h_kv), normal(h_q)
    if selection != "random":
        step = 16 if selection == "local" else 64
        slow = torch.randn(batch, n // step + 1, h_q, dim, device="cuda", generator=gen)
        q = 0.1 * q + slow.repeat_interleave(step, 1)[:, :n]
    gate = torch.rand(batch, n, h_q, device="cuda", generator=gen)
    leaves = [x.bfloat16().requires_grad_() for x in (q, k, v, gate)]
    return leaves, upstream.bfloat16()


def sdpa(backend):
    def run(q, k, v, gate):
        with sdpa_kernel(backend):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    return run


def contenders(spec: BlockSpec, docs):
    yield "SDPA cudnn", sdpa(SDPBackend.CUDNN_ATTENTION)
    yield "SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION)
    yield "triton dense", triton_dense
    yield "sparse with routing", lambda q, k, v, g: kernels.sparse_attention(q, k, v, spec, backend="triton")
    yield "routing", lambda q, k, v, g: kernels.select_blocks(q, k, spec, backend="triton")
    for trunk in ("full", "sparse"):
        yield f"SSA, trunk {trunk}", ssa(spec, trunk, None)
    yield "SSA, one document given", ssa(spec, "full", torch.zeros_like(docs))
    yield "SSA, 8 documents", ssa(spec, "full", docs)


def ssa(spec, trunk, docs):
    return lambda q, k, v, g: kernels.ssa_attention(q, k, v, g, spec, trunk=trunk, doc_starts=docs, backend="triton")


def triton_dense(q, k, v, gate):
    from .triton_backend import _Dense
    from .triton_dense import Dense

    return _Dense.apply(q, k, v, q.shape[3] ** -0.5, Dense(k.shape[1]))


def both_ways(function, leaves, upstream):
    def run():
        result = function(*leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        seeds = (upstream, *(torch.full_like(x, 0.6) for x in outputs[1:]))
        used = leaves if len(outputs) > 1 else leaves[:3]
        torch.autograd.grad(outputs, used, seeds)

    return run


def measure(name, function, leaves, upstream, rep):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        function(*leaves)
        forward = median_ms(lambda: function(*leaves), rep)
    if name == "routing":
        return forward, forward, 0.0
    run = both_ways(function, leaves, upstream)
    run()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return forward, median_ms(run, rep), peak


def ratio(time: float, baseline: float | None) -> float | str:
    return round(time / baseline, 3) if baseline else ""


def bench(shape_name: str, selection: str, rep: int, only: list[str]):
    shape = SHAPES[shape_name]
    batch, n, h_q, _, dim = shape
    leaves, upstream = make(shape, selection)
    place = torch.arange(n, device="cuda", dtype=torch.int32)
    docs = (place // (n // 8) * (n // 8)).expand(batch, -1).contiguous()
    spec, times = BlockSpec(), {}
    for name, function in contenders(spec, docs):
        if only and not any(word in name for word in only):
            continue
        try:
            forward, both, peak = measure(name, function, leaves, upstream, rep)
        except Exception as problem:  # a refusal is a result
            yield {"shape": shape_name, "what": name, "selection": selection, "note": f"refused: {str(problem)[:80]}"}
            continue
        times[name] = both
        flops = 7 * n * n * dim * h_q * batch
        yield {
            "shape": shape_name, "what": name, "selection": selection,
            "forward_ms": round(forward, 3), "both_ms": round(both, 3), "tflops": round(flops / both / 1e9),
            "to_cudnn": ratio(both, times.get("SDPA cudnn")), "to_flash": ratio(both, times.get("SDPA flash")),
        "peak_mib": round(peak), }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["A 8k x4", "A 8k", "A 32k", "B 8k", "C 8k"])
    parser.add_argument("--selection", nargs="+", choices=("random", "local", "overlap"), default=["random"])
    parser.add_argument("--only", nargs="*", default=[], help="contenders whose name contains one of these words")
    parser.add_argument("--rep", type=int, default=100, help="milliseconds of repetition per timing")
    parser.add_argument("--out", type=Path, default=Path("kernels-bench.csv"), help="CSV to append to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("kernels.bench needs a CUDA device")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    common = {
        "date": datetime.date.today().isoformat(), "device": torch.cuda.get_device_name(), "torch": torch.__version__,
        "triton": triton.__version__, "commit": commit,
    }  # fmt: skip
    new = not arguments.out.exists()
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS.split(","))
        if new:
            writer.writeheader()
        for shape in arguments.shape:
            for selection in arguments.selection:
                print(f"{shape} {SHAPES[shape]} {selection}", flush=True)
                for row in bench(shape, selection, arguments.rep, arguments.only):
                    writer.writerow(common | row)
                    file.flush()
                    text = row.get("note") or "{forward_ms:9.3f} / {both_ms:9.3f} ms  {tflops:5} TF/s".format(**row)
                    against = f"  x cudnn {row['to_cudnn']}  x flash {row['to_flash']}" if "to_cudnn" in row else ""
                    print(f"  {row['what']:26s} {text}{against}  {row.get('peak_mib', '')} MiB", flush=True)


if __name__ == "__main__":
    main()
