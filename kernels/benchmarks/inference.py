"""`python -m benchmarks.inference`: decode steps and prefill over a KV cache, sparse against full, in one process.

A decode step appends one token to each of 32 sequences and attends, in each of several layers with caches of their own
(so that no layer finds its cache in L2); times are a layer's share, from Python and from a CUDA graph. The baseline of
a decode is the fastest of our split-KV full decode and two forms of SDPA on the same cache. Prefill is compared with
SDPA flash over the whole prompt. Rows are appended to a dated CSV. It refuses to run without a CUDA device.
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

from ssa_kernels import BlockSpec, KVCache, PagedKVCache, cached_attention, full_attention

HEADS = {"A": (32, 2, 64), "B": (32, 8, 128)}  # Hq, Hkv, D
VERSIONS = ["date", "device", "torch", "triton", "commit"]
COLUMNS = [*VERSIONS, "shape", "what", "ms", "eager_ms", "gb_per_s", "times_faster", "eager_times_faster"]


def median_ms(step, reps: int, warmup: int = 4) -> float:
    """Median over exactly warmup + reps calls (each call lengthens the caches), L2 flushed before each."""
    flush, times = torch.empty(1 << 28, dtype=torch.int8, device="cuda"), []
    for i in range(warmup + reps):
        flush.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        step()
        events[1].record()
        if i >= warmup:
            times.append(events)
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in times)[reps // 2]


def graph_of(step):
    """The step as one CUDA graph; it has run once before, so everything is compiled."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def random_cache(batch, tokens, heads, dim, page):
    """A cache of `tokens` random tokens a sequence, filled in place (its pooled keys are random too)."""
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    if page:
        each = tokens // page
        cache = PagedKVCache(batch, batch * each, page, each, heads, dim, **kind)
        order = torch.randperm(batch * each, generator=torch.Generator().manual_seed(0)).view(batch, each).tolist()
        for b in range(batch):
            cache.assign(b, order[b])
    else:
        cache = KVCache(batch, tokens, heads, dim, **kind)
    for x, size in ((cache.keys, 1.0), (cache.values, 1.0), (cache.pooled, 0.25)):
        x.normal_(0, size)
    cache.pooled[:, :, 1:] *= 2.0**-9
    return cache


def sdpa_step(q, cache, folded: bool):
    """Full decode by SDPA over the whole cache; folded: a group's heads are the rows of one product."""
    k, v = (x.unflatten(0, (cache.batch, -1)).transpose(1, 2) for x in (cache.keys, cache.values))
    if folded:
        return F.scaled_dot_product_attention(q.view(q.shape[0], cache.kv_heads, -1, q.shape[3]), k, v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)


def decode(shape: str, batch: int, tokens: int, layers: int, page: int, reps: int, counts=(16,)):
    """Rows of one cache size. Nothing is appended beyond the capacity: each timing starts `room` tokens below it."""
    h_q, h_kv, dim = HEADS[shape]
    caches = [random_cache(batch, tokens, h_kv, dim, page) for _ in range(layers)]
    q, k, v = (torch.randn(batch, 1, h, dim, device="cuda", dtype=torch.bfloat16) for h in (h_q, h_kv, h_kv))

    def timed(attend, appends=True) -> tuple[float, float]:
        def step():
            for cache in caches:
                if appends:
                    cache.append(k, v)
                attend(cache)

        start = [tokens - 4 * reps] * batch

        def reset():
            for cache in caches:
                cache.host_lengths = list(start)
                cache._publish_lengths()

        reset()
        step()
        eager = median_ms(step, reps) / layers
        reset()
        return eager, median_ms(graph_of(step), reps) / layers

    full = {"full decode": lambda c: cached_attention(q, c, mode="full")}
    if not page:
        full["SDPA decode"] = lambda c: sdpa_step(q, c, False)
        full["SDPA decode, heads folded"] = lambda c: sdpa_step(q, c, True)
    best, name = [], f"{shape} {tokens // 1024}k x{batch}" + (f" pages of {page}" if page else "")
    moved = 2 * batch * h_kv * tokens * dim * 2
    for what, attend in full.items():
        eager, graph = timed(attend, appends=not what.startswith("SDPA"))
        best.append((eager, graph))
        yield {"shape": name, "what": what, "ms": graph, "eager_ms": eager, "gb_per_s": moved / graph / 1e6}
    for count in counts:
        spec = BlockSpec(16, count)
        eager, graph = timed(lambda c, spec=spec: cached_attention(q, c, spec))
        moved = batch * h_kv * dim * 2 * (2 * tokens // 16 + 2 * 16 * count)
        yield {
            "shape": name, "what": f"sparse decode k={count}", "ms": graph, "eager_ms": eager,
            "gb_per_s": moved / graph / 1e6, "times_faster": min(x[1] for x in best) / graph,
            "eager_times_faster": min(x[0] for x in best) / eager,
        }  # fmt: skip


def prefill(shape: str, tokens: int, chunk: int, reps: int):
    """A prompt in chunks (a chunk of `tokens`: whole), append included; SDPA flash over the whole prompt beside it."""
    h_q, h_kv, dim = HEADS[shape]
    q, k, v = (torch.randn(1, tokens, h, dim, device="cuda", dtype=torch.bfloat16) for h in (h_q, h_kv, h_kv))
    cache = KVCache(1, tokens, h_kv, dim, dtype=torch.bfloat16, device="cuda")

    def run(mode):
        cache.crop([0])
        for first in range(0, tokens, chunk):
            part = slice(first, first + chunk)
            cache.append(k[:, part], v[:, part])
            cached_attention(q[:, part], cache, BlockSpec(), mode=mode)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

    name, flash_ms = f"{shape} {tokens // 1024}k", median_ms(flash, reps, 1)
    yield {"shape": name, "what": "prompt, SDPA flash", "ms": flash_ms}
    yield {"shape": name, "what": "prompt, full_attention", "ms": median_ms(lambda: full_attention(q, k, v), reps, 1)}
    for mode in ("sparse", "full"):
        ms = median_ms(lambda mode=mode: run(mode), reps, 1)
        what = f"{mode} prefill, " + ("whole" if chunk == tokens else f"chunks of {chunk}")
        yield {"shape": name, "what": what, "ms": ms, "times_faster": flash_ms / ms}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("--shape", choices=HEADS, default="A")
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--page", type=int, default=0, help="page size; 0: a contiguous cache")
    parser.add_argument("--blocks", nargs="+", type=int, default=[16], help="block counts of the sparse decode")
    parser.add_argument("--prefill", nargs="*", type=int, default=[], help="measure prefill in chunks of these sizes")
    parser.add_argument("--reps", type=int, default=40)
    parser.add_argument("--commit", help="what the rows say of the code, where there is no git")
    parser.add_argument("--out", type=Path, default=Path("kernels-bench-inference.csv"), help="CSV to append to")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.inference needs a CUDA device")
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    device, commit = torch.cuda.get_device_name(), arguments.commit or run.stdout.strip()
    values = datetime.date.today().isoformat(), device, torch.__version__, triton.__version__, commit
    common = dict(zip(VERSIONS, values, strict=True))
    new = not arguments.out.exists()
    with arguments.out.open("a", newline="") as file, torch.no_grad():
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for tokens in arguments.tokens:
            for row in rows(arguments, tokens):
                short = {key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}
                writer.writerow(common | short)
                file.flush()
                print("  ".join(f"{key} {x}" for key, x in short.items()), flush=True)


def rows(a: argparse.Namespace, tokens: int):
    if a.prefill:
        for chunk in a.prefill:
            yield from prefill(a.shape, tokens, min(chunk, tokens), 3)
    else:
        yield from decode(a.shape, a.batch, tokens, 4 if tokens <= 32768 else 2, a.page, a.reps, a.blocks)


if __name__ == "__main__":
    main()
