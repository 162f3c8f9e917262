"""`python -m benchmarks.attention`: times SSA against the vendors' full attention in one process, and says which targets are met.

Every row's own call is first judged against fp64 (`bench_gate`): one that fails is written as failed, and the exit code is 1;
what refuses a shape is a row that says why. Rows go to a dated CSV. It refuses to run without a CUDA device.
"""

import argparse
import csv
import datetime
import math
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from benchmarks import picture as bench_picture
from benchmarks import tables as bench_tables
from benchmarks import targets as bench_targets
from benchmarks.accuracy_gate import judge
from benchmarks.cases import KINDS, PICTURE, SHAPES, Contender, Sample, contenders, gate_and_loss, make, overlap

COLUMNS = (
    "date", "device", "torch", "triton", "commit", "run", "shape", "selection", "jaccard", "blocks_back", "what",
    "forward_ms", "both_ms", "forward_tflops", "both_tflops", "forward_to_cudnn", "both_to_cudnn", "forward_to_flash",
    "both_to_flash", "host_ms", "peak_mib", "note",
)  # fmt: skip
EVERY_KIND = ("A 8k", "B 8k", "C 8k")  # the other shapes are timed on the random selection alone
# Rows that the kind of selection can change, and their baselines.
SELECTIVE = ("SDPA cudnn", "SDPA flash", "sparse", "SSA, trunk", "parallel_nsa")
FLUSH = 1 << 28  # bytes written between two timed calls, so that none finds its inputs in the L2 cache
FLUSH_MS = 0.08  # least that writing them takes


def host_ms(function: Callable, calls: int = 7) -> float:
    """Median time until a call has put its work into an empty queue: Python, autograd, launches."""
    taken = []
    for _ in range(calls):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken) * 1e3


def in_turn_ms(functions: list[Callable], rep: float) -> list[float]:
    """Each one's median over about `rep` milliseconds of calls, 3 to 200, of the device's time, the L2 cache cold.

    The functions are called in turn, so that a card that slows down as it warms slows all of them alike. Before each call
    the device is kept writing for longer than the host needs to launch it, as in a training step, whose queue is full: short
    calls are not timed by Python. (A call that waits for the device still is.)
    """
    cache = torch.empty(FLUSH, dtype=torch.int8, device="cuda")

    def timed(rounds: int, writes: int) -> list[list[float]]:
        events = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)] for _ in functions]
        for i in range(rounds):
            for function, pairs in zip(functions, events, strict=True):
                for _ in range(writes):
                    cache.zero_()
                pairs[i][0].record()
                function()
                pairs[i][1].record()
        torch.cuda.synchronize()
        return [[before.elapsed_time(after) for before, after in pairs] for pairs in events]

    for function in functions:
        function()
    writes = 1 + math.ceil(max(map(host_ms, functions)) / FLUSH_MS)
    once = max(times[0] for times in timed(1, writes))
    return [statistics.median(times) for times in timed(min(200, max(3, int(rep / once))), writes)]


def median_ms(function: Callable, rep: float) -> float:
    return in_turn_ms([function], rep)[0]


def both_ways(contender: Contender, sample: Sample) -> Callable:
    def run():
        result = contender.call(*sample.leaves)
        outputs = result if isinstance(result, tuple) else (result,)
        seeds = (sample.upstream, *(torch.full_like(x, 0.6) for x in outputs[1:]))
        torch.autograd.grad(outputs, sample.leaves if len(outputs) > 1 else sample.leaves[:3], seeds)

    return run


def measure(contender: Contender, sample: Sample, rep: float) -> dict:
    """Times, and the peak of forward and backward above the inputs."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run = both_ways(contender, sample) if contender.backward else lambda: contender.call(*sample.leaves)
    with torch.set_grad_enabled(contender.backward):
        run()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.no_grad():
        forward = median_ms(lambda: contender.call(*sample.leaves), rep)
    found = {"forward_ms": forward, "forward_tflops": contender.flops[0] / forward / 1e9, "peak_mib": peak}
    if contender.backward:
        both = median_ms(run, rep)
        found |= {"both_ms": both, "both_tflops": sum(contender.flops) / both / 1e9, "host_ms": host_ms(run)}
    elif contender.truth == "select":  # routing has no backward: it costs a training step what it costs here
        found |= {"both_ms": forward}
    return found


def rows_of(sample: Sample, rows: list[Contender], run: int, rep: float, judged: dict) -> Iterator[dict]:
    """Every contender's row; ratios are to this run's own baselines, for SSA to cuDNN's calls between its own."""
    jaccard, back = overlap(sample.selected("none"))
    shared = {"run": run, "shape": sample.name, "selection": sample.kind, "jaccard": jaccard, "blocks_back": back}
    base: dict[str, dict] = {}
    calls: dict[str, Callable] = {}
    for contender in rows:
        row, key = shared | {"what": contender.what}, (sample.name, sample.kind, contender.what)
        try:
            if key not in judged:
                judged[key] = judge(contender, sample)
            row |= measure(contender, sample, rep)
            row["note"] = f"FAILED accuracy: {judged[key]}" if judged[key] else ""
        except Exception as problem:  # a refusal is a result
            row["note"] = f"refused: {type(problem).__name__}: {' '.join(str(problem).split())[:120]}"
        base[contender.what] = row
        calls[contender.what] = both_ways(contender, sample)
        for name in ("cudnn", "flash"):
            for way in ("forward", "both"):
                ours, theirs = row.get(f"{way}_ms"), base.get(f"SDPA {name}", {}).get(f"{way}_ms")
                if ours and theirs:
                    row[f"{way}_to_{name}"] = ours / theirs
        if contender.truth == "ssa" and "both_to_cudnn" in row:
            ours, theirs = in_turn_ms([calls[contender.what], calls["SDPA cudnn"]], 4 * rep)
            row["both_to_cudnn"] = ours / theirs
        yield row
    if "SSA, trunk full" in base and sample.kind == "random":
        forward, backward = (median_ms(f, rep) for f in gate_and_loss(sample))
        yield shared | {"what": "gate and loss", "forward_ms": forward, "both_ms": forward + backward, "note": ""}


def chosen(sample: Sample, a: argparse.Namespace) -> list[Contender]:
    """The contenders of one sample that were asked for, less what the kind of selection cannot change."""
    rows = contenders(sample, a.flex, whole=a.picture)
    if a.picture:
        return [c for c in rows if c.what in bench_picture.LINES]
    rows = [c for c in rows if sample.kind == "random" or c.what.startswith(SELECTIVE)]
    return [c for c in rows if not a.only or any(word in c.what for word in a.only)]


def shown(row: dict) -> str:
    if "forward_ms" not in row:
        return f"  {row['what']:30s} {row['note']}"
    both = f"{row['both_ms']:9.3f}" if "both_ms" in row else "        -"
    rate = f"{row.get('forward_tflops', 0):5.0f} / {row.get('both_tflops', 0):4.0f} TF/s"
    against = "  ".join(f"x {n} {row[f'both_to_{n}']:.3f}" for n in ("cudnn", "flash") if f"both_to_{n}" in row)
    text = f"  {row['what']:30s} {row['forward_ms']:8.3f} / {both} ms  {rate}  {row.get('peak_mib', 0):6.0f} MiB  {against}"
    return f"{text}  {row['note']}"


def cell(value):
    return f"{value:.4g}" if isinstance(value, float) else value


def warm(name: str, kind: str, shapes: dict, what: str) -> None:
    """Compile what one contender needs, into Triton's cache on disk; refusals are met again where they are reported."""
    sample = make(name, kind, shapes)
    for contender in contenders(sample):
        if contender.what == what:
            try:
                both_ways(contender, sample)() if contender.backward else contender.call(*sample.leaves)
                torch.cuda.synchronize()
            except Exception:  # the same call is made again to be judged and timed, and what it raises is its row
                return


def warm_all(names: list[str], shapes: dict, workers: int) -> None:
    """One contender of one shape a task. Only compiling is parallel: nothing is timed while these run."""
    ours = ("our dense", "our dense, documents of 1k", "sparse with routing", "SSA, trunk full", "SSA, trunk sparse")
    ours += ("SSA, one document given", "parallel_nsa, given blocks")
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(warm, *zip(*((n, "random", shapes, what) for n in names for what in ours), strict=True)))


def commit_here() -> str:
    run = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    kinds = "; ".join(f"{k}: {v}" for k, v in KINDS.items())
    parser.add_argument(
        "--selection", nargs="+", choices=KINDS, help=f"default: all at {EVERY_KIND}, else random. {kinds}"
    )
    parser.add_argument("--only", nargs="*", default=[], help="contenders whose name contains one of these words")
    parser.add_argument("--runs", type=int, default=1, help="repeat everything; targets are judged by the median")
    parser.add_argument("--rep", type=float, default=50.0, help="milliseconds of calls per timing")
    parser.add_argument("--flex", action="store_true", help="also FlexAttention (compiling it takes a while per shape)")
    parser.add_argument(
        "--picture", action="store_true", help="time lengths 1k to 128k and write results/attention-h100.svg"
    )
    parser.add_argument(
        "--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile; 0: none"
    )
    parser.add_argument("--commit", default=commit_here(), help="what the rows say of the code, where there is no git")
    parser.add_argument("--out", type=Path, default=Path("kernels-bench.csv"), help="CSV to append to")
    return parser.parse_args()


def writer(path: Path, common: dict) -> Callable[[dict], None]:
    """Appends rows; a file with other columns is not touched."""
    if path.exists() and path.open().readline().strip() != ",".join(COLUMNS):
        raise SystemExit(f"{path} has other columns: move it away or choose another --out")
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")

    def write(row: dict) -> None:
        with path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS).writerow({key: cell(value) for key, value in (common | row).items()})

    return write


def main() -> int:
    a = arguments()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.attention needs a CUDA device")
    device = torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    common = {"date": datetime.date.today().isoformat(), "device": device, **versions, "commit": a.commit}
    write, rows, judged, start = writer(a.out, common), [], {}, time.time()
    names, shapes = (list(PICTURE), PICTURE) if a.picture else (a.shape, SHAPES)
    if a.workers:
        print(f"compiling for {', '.join(names)}", flush=True)
        warm_all(names, shapes, a.workers)
        print(f"compiled in {time.time() - start:.0f} s", flush=True)
    for run in range(1, a.runs + 1):
        for name in names:
            for kind in a.selection or (KINDS if name in EVERY_KIND and not a.picture else ("random",)):
                sample = make(name, kind, shapes)
                print(f"run {run}: {name} {shapes[name]} {kind}", flush=True)
                for row in rows_of(sample, chosen(sample, a), run, a.rep, judged):
                    write(row)
                    rows.append(row)
                    print(shown(row), flush=True)
                print(f"  jaccard {rows[-1]['jaccard']:.2f}, {rows[-1]['blocks_back']:.0f} blocks back", flush=True)
                del sample
    if a.picture:
        path = Path(__file__).parent / "results" / "attention-h100.svg"
        path.write_text(bench_picture.draw(rows, common))
        print(f"wrote {path}")
    else:
        tables = [bench_tables.times(rows, kind) for kind in KINDS]
        print("\n" + "\n\n".join([*filter(None, tables), bench_targets.table(rows)]))
    failed = [row for row in rows if row["note"].startswith("FAILED")]
    print(f"{len(rows)} rows, {len(failed)} failed accuracy, {time.time() - start:.0f} s on {device}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
