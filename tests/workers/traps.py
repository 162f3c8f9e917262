"""Silent traps of the libraries, sprung on purpose in a worker: what a comparison must then notice.

A spring is (before, after): `before()` is a context around building model and optimizer, `after(model, optimizer)` runs once they
are there. None of them raises by itself: that is what makes them traps.
"""

import dataclasses
from contextlib import nullcontext
from unittest import mock

from ssa_megatron.zero.optimizer import ShardedOptimizer
from tests.ssa_megatron.support import changed_deepspeed


def _batch_sends(model, optimizer) -> None:
    for chunk in model:
        for module in chunk.modules():
            if hasattr(module, "config"):
                module.config.batch_p2p_comm = True


def _leave_boundary_off(model, optimizer) -> None:
    optimizer.engine.set_gradient_accumulation_boundary(False)


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


def _nothing(model, optimizer) -> None:
    pass


SPRINGS = {
    "sends of an interleaved pipeline are batched": (nullcontext, _batch_sends),
    "DeepSpeed accumulates as well": (
        lambda: changed_deepspeed(lambda c: c.update(gradient_accumulation_steps=2)),
        _nothing,
    ),
    "the accumulation boundary stays off": (nullcontext, _leave_boundary_off),
    "norms under sequence parallelism are not summed": (nullcontext, _forget_norms),
    "norms are not summed in each micro-batch": (_no_hooks, _nothing),
    "matrices are not marked as cut": (nullcontext, _not_marked_as_cut),
    "a tied embedding's two gradients are not summed": (nullcontext, _forget_tied),
    "a tied embedding counts twice in the norm": (nullcontext, _count_tied_twice),
    "gradients are reduced in bf16": (lambda: changed_deepspeed(lambda c: c.pop("communication_data_type")), _nothing),
    "working weights are not refreshed": (nullcontext, _keep_working_weights),
}
