"""The recipe's optimizer, whose state DeepSpeed shards over the data-parallel ranks.

Under ZeRO-1 DeepSpeed sees finished gradients only: Megatron's schedule accumulates micro-batches, `finish_gradients` adds what
tensor parallelism owes (sequence-parallel norms), `step` reduces over data-parallel ranks, clips by the global norm, and
updates. ZeRO-2 and 3 reduce and partition each micro-batch's gradients as they appear, so forward and backward go through
`backward_engine`, and tensor parallelism is paid in hooks. `fragments` shows which range of which parameter this rank owns,
without any communication; checkpoints are made of them.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model import fused
from ssa_megatron.model.build import SSAModel
from ssa_megatron.model.names import named_parameters
from ssa_megatron.optim import optimizer_of
from ssa_megatron.parallel.device import fused_optimizer, on_gpu
from ssa_megatron.parallel.state import Mpu, ParallelState
from ssa_megatron.zero.accumulation import accumulate_in_products
from ssa_megatron.zero.ds_config import deepspeed_config
from ssa_megatron.zero.shards import Fragment, PartitionedWeights, SharedWeights


class ShardedOptimizer:
    """An optimizer under ZeRO for one model on this rank; `kind` describes its state."""

    def __init__(self, model: SSAModel, recipe: Recipe, parallel: ParallelState):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.recipe, self.parallel = recipe, parallel
        self.kind = optimizer_of(recipe)
        self.named = list(named_parameters(model, recipe, parallel))
        self.config = deepspeed_config(recipe)
        fused = fused_optimizer(offloaded=recipe.zero.offload_optimizer)
        # DeepSpeed prints memory figures and advice about features that are switched off here on purpose
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.kind.build([named.parameter for named in self.named], fused=fused),
                mpu=Mpu(parallel),
                config=self.config,
                dist_init_required=False,
            )
        self._inner = self.engine.optimizer.optimizer
        sharding = PartitionedWeights if recipe.zero.stage == 3 else SharedWeights
        self._shards = sharding(self.engine.optimizer, self.named, self.kind)
        self.backward_engine = self.engine if recipe.zero.stage > 1 else None
        if self._accumulates_in_products():
            accumulate_in_products(model, self.engine.optimizer)
        if self.backward_engine and recipe.parallel.sequence:
            for parameter in self._sequence_parallel_parameters():
                parameter.register_hook(self._sum_over_tensor_ranks)

    def _accumulates_in_products(self) -> bool:
        recipe = self.recipe
        simple = recipe.train.precision == "bf16" and recipe.zero.stage == 1 and self.parallel.tp_size == 1
        return simple and fused.wanted(recipe) and on_gpu()

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The gradient accumulated so far, in the parameter's shape: fp32 under bf16 training, else the parameter's own."""
        accumulated = getattr(
            parameter, "_hp_grad", None
        )  # exists after the first backward, only with fp32 accumulation
        return parameter.grad if accumulated is None else accumulated.view(parameter.shape)

    def finish_gradients(self) -> None:
        """After the last micro-batch: what each of several ranks saw a part of is summed over them.

        Norms under sequence parallelism (each tensor-parallel rank saw its own tokens; under ZeRO-2 and 3 a hook has done it),
        and a tied embedding under pipeline parallelism (the first stage embeds with it, the last multiplies by it).
        """
        if self.recipe.parallel.sequence and self.backward_engine is None:
            for parameter in self._sequence_parallel_parameters():
                dist.all_reduce(self.gradient(parameter), group=self.parallel.tp_group)
        for named in self.named:
            if named.tied:
                dist.all_reduce(self.gradient(named.parameter), group=self.parallel.embedding_group)

    def _sequence_parallel_parameters(self) -> list[torch.nn.Parameter]:
        return [named.parameter for named in self.named if named.replicated] if self.recipe.parallel.sequence else []

    def _sum_over_tensor_ranks(self, gradient: Tensor) -> Tensor:
        total = gradient.float()  # a copy under bf16; a gradient given to a hook must not be changed
        total = total.clone() if total is gradient else total
        dist.all_reduce(total, group=self.parallel.tp_group)
        return total.to(gradient.dtype)

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip, update at learning rate `lr`. Returns (global gradient norm before clipping, whether it was applied)."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        self.engine.step()
        applied = self.engine.was_step_applied()
        if not applied:  # ZeRO-2 with offload would carry non-finite gradients into the next step
            self.discard_gradients()
        return float(self.engine.get_global_grad_norm()), applied

    def discard_gradients(self) -> None:
        """Forget the accumulated gradients: the step is skipped."""
        self._shards.discard_gradients()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share, in model order."""
        return self._shards.fragments()

    @property
    def applied_steps(self) -> int | None:
        """Updates made so far, as the optimizer counts them; None if it keeps no count."""
        return self._shards.step_count

    def restored(self, applied_steps: int) -> None:
        """Call after `fragments` were filled: sets the optimizer's step count and refreshes the working weights."""
        self._shards.step_count = applied_steps
        self._shards.refresh()
