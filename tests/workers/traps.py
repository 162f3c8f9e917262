"""Silent traps of the libraries, sprung on purpose in a worker: what a comparison must then notice.

A spring is (before, after): `before()` is a context around building model and optimizer, `after(model, optimizer)` runs once they
exist. No spring may raise, nor may the libraries after it: a trap that raises is not silent, and the worker ends with the error.
"""

import dataclasses
from contextlib import nullcontext
from unittest import mock

from megatron.core import parallel_state

from ssa_megatron.parallel.state import Mpu
from ssa_megatron.zero.optimizer import ShardedOptimizer
from tests.ssa_megatron.support import changed_deepspeed


def _batch_sends(model, optimizer) -> None:
    for chunk in model:
        for module in chunk.modules():
            if hasattr(module, "config"):
                module.config.batch_p2p_comm, module.config.overlap_p2p_comm = True, False  # Megatron's defaults


def _forget_norms(model, optimizer) -> None:
    optimizer._sequence_parallel_parameters = list


def _forget_tied(model, optimizer) -> None:
    optimizer.named = [dataclasses.replace(named, tied=False) for named in optimizer.named]


def _count_tied_twice(model, optimizer) -> None:
    for named in optimizer.named:
        named.parameter.ds_pipe_replicated = False


def _keep_working_weights(model, optimizer) -> None:
    optimizer.engine.optimizer.update_lp_params = lambda *_, **__: None


def _not_marked_as_cut(model, optimizer) -> None:
    for named in optimizer.named:
        named.parameter.tensor_model_parallel = False


def _no_hooks():
    """Where gradients are reduced during backward, sequence-parallel norms are summed in hooks registered at the start."""
    return mock.patch.object(ShardedOptimizer, "_sum_over_tensor_ranks", lambda self, gradient: gradient)


def _data_parallel_ranks_only():
    """Each context-parallel rank has seen its own positions; DeepSpeed reduces over the group that the mpu names."""
    dp = parallel_state.get_data_parallel_group
    return mock.patch.multiple(
        Mpu,
        get_data_parallel_group=lambda self: dp(with_context_parallel=False),
        get_data_parallel_rank=lambda self: self._c.dp_rank,
        get_data_parallel_world_size=lambda self: self._c.dp_size,
    )


def _norm_of_one_rank():
    """The norm that clips is summed over the model-parallel group."""
    # where tensor parallelism takes all processes, the data-parallel group is the rank alone
    return mock.patch.multiple(Mpu, get_model_parallel_group=lambda self: parallel_state.get_data_parallel_group())


def _nothing(model, optimizer) -> None:
    pass


def _raise(model, optimizer) -> None:
    raise NameError("this spring is broken")


BROKEN = {"a spring that raises": (nullcontext, _raise)}
"""For the control: its error must not count as noticed."""
SPRINGS = {
    "sends of an interleaved pipeline are batched": (nullcontext, _batch_sends),
    "DeepSpeed accumulates as well": (
        lambda: changed_deepspeed(lambda c: c.update(gradient_accumulation_steps=2)),
        _nothing,
    ),
    "gradients are not summed over context-parallel ranks": (_data_parallel_ranks_only, _nothing),
    "every rank clips by its own norm": (_norm_of_one_rank, _nothing),
    "norms under sequence parallelism are not summed": (nullcontext, _forget_norms),
    "norms are not summed in each micro-batch": (_no_hooks, _nothing),
    "matrices are not marked as cut": (nullcontext, _not_marked_as_cut),
    "a tied embedding's two gradients are not summed": (nullcontext, _forget_tied),
    "a tied embedding counts twice in the norm": (nullcontext, _count_tied_twice),
    "gradients are reduced in bf16": (lambda: changed_deepspeed(lambda c: c.pop("communication_data_type")), _nothing),
    "working weights are not refreshed": (nullcontext, _keep_working_weights),
}
