"""`python -m tests.gpu.sanitize`: a sample of the fuzzer's cases under compute-sanitizer, each allocation guarded by itself.

PyTorch's caching allocator is off, or an access past a tensor would land in its neighbour unseen; kernels are compiled first, in
parallel, because Triton's compiler need not be watched. compute-sanitizer comes with the CUDA toolkit (or the package
nvidia-cuda-sanitizer-api) and must be in PATH. Exit code: the sanitizer's, 1 where it found anything.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from .fuzz_cases import check, draw_case, draw_configuration


def compile_case(seed: int, index: int) -> None:
    configuration = draw_configuration(seed, index)
    check(configuration, draw_case(configuration, seed, index, 0), "cuda", judge=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.sanitize", description=__doc__)
    parser.add_argument("--tool", default="memcheck", help="memcheck, racecheck, synccheck or initcheck")
    parser.add_argument("--cases", type=int, default=20, help="configurations of the fuzzer, one case of each")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no further case after this long")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    tool = shutil.which("compute-sanitizer")
    if not torch.cuda.is_available() or tool is None:
        raise SystemExit("tests.gpu.sanitize needs a CUDA device and compute-sanitizer in PATH")
    with ProcessPoolExecutor(min(16, a.cases), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_case, [a.seed] * a.cases, range(a.cases)))
    cases = ["--cases", a.cases, "--configurations", a.cases, "--seconds", a.seconds, "--seed", a.seed]
    command = [tool, "--tool", a.tool, "--error-exitcode", "1", sys.executable, "-W", "ignore", "-m", "tests.gpu.fuzz"]
    command += [*map(str, cases), "--workers", "0", "--no-judge"]
    return subprocess.run(command, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
