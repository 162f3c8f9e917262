"""How fast this device multiplies and copies: two short measurements, the same on a GPU and on a CPU.

On a GPU they are long enough to reach the clocks of a loaded device, and `under_load` looks at it meanwhile.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Speed:
    matmul: float
    """FLOP/s: bf16, 8192 cubed on a GPU; fp32, 768 cubed on a CPU (one process, its threads)."""
    copy: float
    """Bytes/s read plus written: 1 GiB on a GPU, 64 MiB on a CPU."""
    meanwhile: Any = None
    """What `under_load` returned."""


def measure(device: torch.device, under_load: Callable[[], Any] = lambda: None) -> Speed:
    """Takes about two seconds on a GPU, half a second on a CPU."""
    on_gpu = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if on_gpu else (768, torch.float32)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)
    source = torch.ones((2**30 if on_gpu else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: torch.mm(left, right, out=out), device)
    flops = 2 * size**3 / seconds
    meanwhile = None
    if on_gpu:
        for _ in range(int(1.5 / seconds)):
            torch.mm(left, right, out=out)
        meanwhile = under_load()  # while the queue above is worked off
        torch.cuda.synchronize(device)
    return Speed(flops, 2 * source.nbytes / _best(lambda: target.copy_(source), device), meanwhile)


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the median of five batches of calls, after one batch to warm up."""
    calls, times = (20 if device.type == "cuda" else 5), []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - began) / calls)
    return sorted(times[1:])[2]
