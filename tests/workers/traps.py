"""Silent traps of the libraries, sprung on purpose in a worker: what a comparison must then notice.

A spring is (before, after): `before()` is a context around building model and optimizer, `after(model, optimizer)` runs once they
are there. None of them raises by itself: that is what makes them traps.
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from ssa_megatron.zero import optimizer as zero_optimizer


@contextmanager
def _config(change: Callable[[dict], object]) -> Iterator[None]:
    real = zero_optimizer.deepspeed_config

    def changed(recipe) -> dict:
        config = real(recipe)
        change(config)
        return config

    zero_optimizer.deepspeed_config = changed
    try:
        yield
    finally:
        zero_optimizer.deepspeed_config = real


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


def _nothing(model, optimizer) -> None:
    pass


SPRINGS = {
    "sends of an interleaved pipeline are batched": (nullcontext, _batch_sends),
    "DeepSpeed accumulates as well": (lambda: _config(lambda c: c.update(gradient_accumulation_steps=2)), _nothing),
    "the accumulation boundary stays off": (nullcontext, _leave_boundary_off),
    "norms under sequence parallelism are not summed": (nullcontext, _forget_norms),
    "a tied embedding's two gradients are not summed": (nullcontext, _forget_tied),
    "a tied embedding counts twice in the norm": (nullcontext, _count_tied_twice),
    "gradients are reduced in bf16": (lambda: _config(lambda c: c.pop("communication_data_type")), _nothing),
    "working weights are not refreshed": (nullcontext, _keep_working_weights),
}
