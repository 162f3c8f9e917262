"""Where this process stands: ranks, sizes and groups of every kind of parallelism.

This is the only module that touches megatron-core's global parallel state; everyone else receives the ParallelState. It
also is the `mpu` that DeepSpeed asks for groups. One process needs no launcher: `initialize` makes a world of one.
"""

import datetime
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ssa_megatron.config import Recipe
from ssa_megatron.errors import ConfigError, EnvironmentProblem, PortTaken
from ssa_megatron.parallel import device, topology

TIMEOUT = datetime.timedelta(minutes=10)  # a rank that is silent for longer is gone; every collective ends by then


@dataclass(frozen=True)
class ParallelState:
    """Ranks, sizes and groups. Groups are torch.distributed process groups."""

    rank: int
    world_size: int
    device: torch.device
    tp_rank: int
    tp_size: int
    dp_rank: int
    dp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    vpp_size: int
    """Chunks of layers on each pipeline rank; more than one when the schedule is interleaved."""
    tp_group: Any
    dp_cp_group: Any
    """Ranks that hold the same parameters and see different tokens: data- times context-parallel. ZeRO shards over it."""
    cp_group: Any
    model_parallel_group: Any
    """Ranks that hold the other parameters of this copy of the model: tensor- times pipeline-parallel."""
    embedding_group: Any
    """First and last pipeline stage, which hold a copy each of a tied embedding; None elsewhere."""
    gloo_group: Any
    """All ranks over gloo, for decisions and other objects that live in host memory."""

    @property
    def is_first_stage(self) -> bool:
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def dp_cp_size(self) -> int:
        """Ranks of `dp_cp_group`."""
        return self.dp_size * self.cp_size

    @property
    def is_rank0(self) -> bool:
        """The one rank that writes logs, metrics and manifests."""
        return self.rank == 0

    def describe(self) -> str:
        """`tensor 2, data 4`: the sizes that are not 1, and the data-parallel one."""
        sizes = {"tensor": self.tp_size, "pipeline": self.pp_size, "context": self.cp_size, "data": self.dp_size}
        return ", ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data")

    def barrier(self) -> None:
        dist.barrier(group=self.gloo_group)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.gloo_group)
        return box[0]

    def run_on_rank0(self, action: Callable[[], Any]) -> Any:
        """Run `action` on the writer rank only; its result, or the error it raised, on every rank."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.is_rank0:
            try:
                outcome = (action(), None)
            except Exception as problem:  # raised again below, on all ranks: none of them may wait for the others
                outcome = (None, problem)
        result, error = self.broadcast_object(outcome)
        if error is not None:
            raise error
        return result

    def run_on_all(self, action: Callable[[], Any]) -> Any:
        """Run `action` on every rank; each gets its own result, or all raise the error that the lowest failing rank met."""
        result, error = None, None
        try:
            result = action()
        except Exception as problem:  # raised again below, on all ranks: none of them may wait for the others
            error = problem
        first = next((e for e in self.all_gather_object(error) if e is not None), None)
        if first is not None:
            raise first
        return result

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value`, on every rank, in rank order."""
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.gloo_group)
        return values

    def gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value` in rank order, on the writer rank; nothing on the others, which have no use for a copy."""
        values = [None] * self.world_size if self.is_rank0 else None
        dist.gather_object(value, values, dst=0, group=self.gloo_group)
        return values or []

    def all_reduce_max(self, *values: int) -> list[int]:
        """For each value the largest that a rank has; the same answer on all."""
        box = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.gloo_group)
        return box.tolist()

    def all_reduce_sum(self, value: float, error: BaseException | None = None) -> float:
        """The sum of `value` over data- and context-parallel ranks (equal on tensor- and pipeline-parallel ones), fp64.

        The same on every rank; if a rank has an error, all raise it.
        """
        box = torch.tensor((value, float(error is not None)), dtype=torch.float64)
        dist.all_reduce(box, group=self.gloo_group)
        total, failed = box.tolist()
        if failed:
            raise next(e for e in self.all_gather_object(error) if e is not None)
        return total / (self.tp_size * self.pp_size)


class Mpu:
    """What DeepSpeed calls an mpu, answered from a ParallelState."""

    def __init__(self, parallel: ParallelState):
        self._c = parallel

    def get_data_parallel_group(self):
        return self._c.dp_cp_group

    def get_data_parallel_rank(self):
        return self._c.dp_rank * self._c.cp_size + self._c.cp_rank

    def get_data_parallel_world_size(self):
        return self._c.dp_cp_size

    def get_model_parallel_group(self):
        return self._c.model_parallel_group

    def get_model_parallel_rank(self):
        return self._c.pp_rank * self._c.tp_size + self._c.tp_rank

    def get_model_parallel_world_size(self):
        return self._c.pp_size * self._c.tp_size

    def get_tensor_model_parallel_group(self):
        return self._c.tp_group

    def get_tensor_model_parallel_rank(self):
        return self._c.tp_rank

    def get_tensor_model_parallel_world_size(self):
        return self._c.tp_size


def world_size() -> int:
    """Processes in this launch; 1 without a launcher. Raises ConfigError where srun alone started several of them."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "WORLD_SIZE" not in os.environ and tasks != "1":  # one would win the run folder, and train alone
        raise ConfigError(
            f"srun started {tasks} processes, and nothing has told them of each other",
            remedy="cluster/submit; or srun --ntasks-per-node=1 python -m ssa_cluster.launch --nproc-per-node N train ...; "
            "one process on purpose, as in a shell that srun --pty gave: WORLD_SIZE=1 ssa train ...",
            id="srun-without-launcher",
        )
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(recipe: Recipe) -> ParallelState:
    """Join the launch (torchrun's environment variables), build every group, and return where this process stands.

    Raises ConfigError when the topology is not legal, EnvironmentProblem when the processes do not find each other, and
    PortTaken when their port is in use by another process.
    """
    topology.check(recipe, world_size())
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(_free_port())
    _order_kernels(recipe)
    device.adapt()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not dist.is_initialized():
        try:
            dist.init_process_group(backend=device.backend(), timeout=TIMEOUT)
        except (dist.DistError, RuntimeError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            if "EADDRINUSE" in str(error):  # whoever launches chooses a free port, and lets it go for rank 0 to take
                raise PortTaken(
                    f"rank 0 cannot listen at {address}, where the {world_size()} process(es) were to meet: the port is taken",
                    remedy="start again (ssa_cluster.launch does, at another port), or choose a MASTER_PORT",
                    id="port-taken",
                ) from error
            raise EnvironmentProblem(
                f"the {world_size()} processes did not find each other at {address}: {error}",
                remedy="check MASTER_ADDR, MASTER_PORT and that every node was started",
                id="rendezvous-failed",
            ) from error
    p = recipe.parallel
    if p.pipeline > 1 and device.on_gpu() and dist.get_backend() == "gloo":
        raise EnvironmentProblem(
            f"parallel.pipeline={p.pipeline} with several processes on one GPU: they share it over gloo, which cannot send "
            "GPU tensors from stage to stage",
            remedy="one process per GPU, or parallel.pipeline=1",
            id="pipeline-on-shared-gpu",
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline if p.virtual_pipeline > 1 else None,
        context_parallel_size=p.context,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(recipe.train.seed)  # dropout is 0: recomputation wants the tracker to exist
    return ParallelState(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        device=device.current(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        vpp_size=p.virtual_pipeline,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_cp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        cp_group=parallel_state.get_context_parallel_group(),
        embedding_group=parallel_state.get_embedding_group(check_initialized=False),
        model_parallel_group=parallel_state.get_model_parallel_group(),
        gloo_group=dist.new_group(backend="gloo", timeout=TIMEOUT),
    )


def _order_kernels(recipe: Recipe) -> None:
    """Before CUDA starts, which reads it: with tensor parallelism a GPU starts kernels in the order they were given.

    megatron-core's linear layers rely on it to hide the communication of their backward behind the weight's gradient.
    """
    if recipe.parallel.tensor > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def finalize() -> None:
    """Leave the launch: tear down every group. Safe to call twice."""
    from megatron.core import parallel_state

    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
