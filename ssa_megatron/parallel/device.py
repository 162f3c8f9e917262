"""Device selection, and shims for running megatron-core without CUDA.

Training asks this module, and no other, which device there is and what it can do. `adapt()` changes nothing when CUDA is
available. Without CUDA it answers the calls that megatron-core makes unconditionally: each replacement was needed (the named part
fails without it), and none changes arithmetic.
"""

import os
import resource

import torch
from torch.profiler import ProfilerActivity


def on_gpu() -> bool:
    """Whether processes of this machine compute on a CUDA device."""
    return torch.cuda.is_available()


def current() -> torch.device:
    """Where this process computes: its own GPU (LOCAL_RANK), or the CPU."""
    if not on_gpu():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def backend() -> str:
    """torch.distributed backend; several processes on one GPU share it over gloo, because NCCL refuses them."""
    if not on_gpu():
        return "gloo"
    shared = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > torch.cuda.device_count()
    return "gloo" if shared else "nccl"


def peak_memory() -> int:
    """Bytes this process has used at most: of its GPU's memory, or of the machine's."""
    if on_gpu():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gpu_name() -> str | None:
    """The GPU's product name; None on a CPU."""
    return torch.cuda.get_device_name(current()) if on_gpu() else None


def synchronize() -> None:
    """Wait for the device to finish what it was given; a CPU has."""
    if on_gpu():
        torch.cuda.synchronize()


def event() -> "torch.cuda.Event | None":
    """An event recorded on the current stream; None on a CPU."""
    if not on_gpu():
        return None
    recorded = torch.cuda.Event()
    recorded.record()
    return recorded


def profiler_activities() -> list[ProfilerActivity]:
    """What torch.profiler can record here."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu() else [])]


def fused_optimizer(*, offloaded: bool) -> bool:
    """Whether torch's fused optimizers run where the optimizer state is: on a GPU, or offloaded from one to the host."""
    return on_gpu() or offloaded


def adapt() -> None:
    """Call once, before any megatron-core model is built."""
    if on_gpu():
        torch.cuda.set_device(current())
        os.environ["LOCAL_RANK"] = str(
            current().index
        )  # DeepSpeed takes it for a GPU's number, also where ranks share one
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed probes, warns and may pick wrongly
    import deepspeed.ops
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as random

    # DeepSpeed compiles a shared-memory all-reduce (45 s) that only its tensor-parallel inference uses, and leaves its segments
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    def current_device():
        return torch.device("cpu")

    torch.cuda.current_device = current_device  # rotary embedding, p2p buffers
    torch.cuda.synchronize = lambda *_, **__: None  # p2p
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()  # RNG tracker; dropout is 0 everywhere, so only
    torch.cuda.manual_seed = lambda *_, **__: None  # the bookkeeping of activation recomputation uses it
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # context parallelism; tied embeddings
    if not isinstance(schedules.torch, _TorchOnCPU):
        schedules.torch = _TorchOnCPU()


class _TorchOnCPU:
    """`torch` with device="cuda" read as the CPU: the schedules hard-code it for a token counter."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def zeros(self, *args, **kwargs):
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return torch.zeros(*args, **kwargs)
