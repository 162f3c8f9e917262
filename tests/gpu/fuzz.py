"""`python -m tests.gpu.fuzz --cases 10000 --seconds 150`: random shapes and inputs through every kernel, judged in fp64.

Worker processes share one GPU, each with a few configurations of its own (Triton compiles once for each), and draw cases until
the total is reached. A failure names the (seed, configuration, case) that repeats it with `--only`, and makes the exit code 1;
so does a worker that dies. It refuses to run without a CUDA device, unless Triton's interpreter is on (`--tiny`).
"""

import argparse
import multiprocessing
import time
from collections import Counter
from queue import Empty

import torch

from .fuzz_cases import Outcome, check, draw_case, draw_configuration

SHOWN = 20  # failures printed in full


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=16, help="processes; 0 runs in this one (compute-sanitizer)")
    parser.add_argument("--configurations", type=int, default=3, help="configurations of each worker")
    parser.add_argument("--seconds", type=float, default=150.0, help="stop after this long, with what was done")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="CONFIGURATION:CASE of a failure, to run it alone")
    parser.add_argument("--tiny", action="store_true", help="small fp32 cases on the CPU, under Triton's interpreter")
    parser.add_argument("--no-judge", action="store_true", help="run the kernels and compare nothing")
    return parser.parse_args()


class Tally:
    """Worst shares of the tolerance by stream, counts, failures."""

    def __init__(self):
        self.cases, self.failed, self.worst, self.failures = 0, 0, {}, []
        self.compiling = self.running = 0.0  # seconds of all workers: first cases of a configuration, and the others

    def add(self, where: str, outcome) -> None:
        self.cases += 1
        for v in outcome.verdicts:
            key = v.what.rstrip(" 0123456789")
            seen = self.worst.get(key, (0.0, "", 0.0, ""))
            norm = (v.of_norm, where) if v.of_norm > seen[0] else seen[:2]
            worst = (v.of_worst, where) if v.of_worst > seen[2] else seen[2:]
            self.worst[key] = (*norm, *worst)
        if outcome.failures:
            self.failed += 1
            self.failures.append((where, outcome.failures))

    def merge(self, other: "Tally") -> None:
        self.cases, self.failed = self.cases + other.cases, self.failed + other.failed
        self.failures += other.failures
        self.compiling, self.running = self.compiling + other.compiling, self.running + other.running
        for key, (norm, at, worst, place) in other.worst.items():
            mine = self.worst.get(key, (0.0, "", 0.0, ""))
            self.worst[key] = (*max(mine[:2], (norm, at)), *max(mine[2:], (worst, place)))


def run_one(a: argparse.Namespace, index: int, number: int, tally: Tally) -> None:
    configuration = draw_configuration(a.seed, index, a.tiny)
    case, start = draw_case(configuration, a.seed, index, number, a.tiny), time.time()
    try:
        outcome = check(configuration, case, "cpu" if a.tiny else "cuda", not a.no_judge)
    except Exception as problem:
        if "CUDA error" in str(problem):  # nothing this process does afterwards would mean anything
            raise
        outcome = Outcome([], [f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}"])
    tally.add(f"{index}:{number}", outcome)
    if number:
        tally.running += time.time() - start
    else:
        tally.compiling += time.time() - start


def prepare() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)


def worker(rank: int, a: argparse.Namespace, deadline: float, taken, current, queue) -> None:
    """Configurations rank, rank + workers, ...: an equal share of each in turn, until all cases are taken."""
    prepare()
    tally = Tally()
    mine = [rank + i * max(1, a.workers) for i in range(a.configurations)]
    share = max(1, a.cases // (max(1, a.workers) * a.configurations))
    numbers = Counter()
    for turn in range(1 << 30):
        index = mine[turn // share % len(mine)]
        with taken.get_lock():
            if taken.value >= a.cases or time.time() > deadline:
                break
            taken.value += 1
        current[2 * rank : 2 * rank + 2] = [index, numbers[index]]
        run_one(a, index, numbers[index], tally)
        numbers[index] += 1
    queue.put((rank, tally))


def spawn(a: argparse.Namespace) -> tuple[Tally, list[str]]:
    """All workers' tallies, and what became of workers that died."""
    parallel = multiprocessing.get_context("spawn")
    deadline, taken = time.time() + a.seconds, parallel.Value("q", 0)
    current, queue = parallel.Array("q", 2 * a.workers), parallel.Queue()
    processes = [
        parallel.Process(target=worker, args=(rank, a, deadline, taken, current, queue), daemon=True)
        for rank in range(a.workers)
    ]
    for process in processes:
        process.start()
    total, waiting, dead, said, start = Tally(), set(range(a.workers)), [], time.time(), time.time()
    while waiting:
        try:
            rank, tally = queue.get(timeout=1)
        except Empty:  # nobody finished within this second
            for rank in [r for r in waiting if processes[r].exitcode not in (None, 0) or time.time() > deadline + 30]:
                index, number = current[2 * rank : 2 * rank + 2]
                how = (
                    "did not end" if processes[rank].exitcode is None else f"died with code {processes[rank].exitcode}"
                )
                dead.append(f"worker {rank} {how} at --only {index}:{number}")
                waiting.discard(rank)
                processes[rank].kill()
            if time.time() > said + 10:
                said = time.time()
                print(f"  {said - start:4.0f} s  {taken.value} cases begun", flush=True)
            continue
        waiting.discard(rank)
        total.merge(tally)
    return total, dead


def main() -> int:
    a = arguments()
    if not a.tiny and not torch.cuda.is_available():
        raise SystemExit("tests.gpu.fuzz needs a CUDA device (or --tiny with TRITON_INTERPRET=1)")
    start, dead = time.time(), []
    if a.only or a.workers == 0:
        prepare()
        total, configurations = Tally(), max(1, a.configurations)
        cases = (
            [tuple(map(int, a.only.split(":")))]
            if a.only
            else [divmod(i, -(-a.cases // configurations)) for i in range(a.cases)]
        )
        for index, number in cases:
            if a.only:
                configuration = draw_configuration(a.seed, index, a.tiny)
                print(configuration, draw_case(configuration, a.seed, index, number, a.tiny), sep="\n")
            if time.time() - start < a.seconds:
                run_one(a, index, number, total)
    else:
        total, dead = spawn(a)
    took = time.time() - start
    for where, failures in total.failures[:SHOWN]:
        print(f"FAILED --seed {a.seed} --only {where}: " + "; ".join(failures))
    for text in dead:
        print(f"FAILED --seed {a.seed}: {text}")
    print("share of the tolerance, worst of all cases:  norm (where)  largest element (where)")
    for key, (norm, at, worst, place) in sorted(total.worst.items()):
        print(f"  {key:20s} {norm:6.2f} {at:>9s}   {worst:6.2f} {place:>9s}")
    short = f" (of {a.cases} wanted: out of time)" if total.cases < a.cases else ""
    ended = f"{total.failed} failed, {len(dead)} workers lost, {took:.0f} s, {total.cases / took:.1f} cases/s"
    print(f"workers' seconds: {total.compiling:.0f} compiling, {total.running:.0f} running")
    print(f"{total.cases} cases{short}, {ended}, seed {a.seed}")
    return 1 if total.failed or dead or not total.cases else 0


if __name__ == "__main__":
    raise SystemExit(main())
