"""The optimizer: AdamW whose state DeepSpeed shards over the data-parallel ranks, around a model that Megatron's schedule drives.

DeepSpeed sees finished gradients only: the schedule accumulates micro-batches, `finish_gradients` adds what tensor parallelism
owes (sequence-parallel norms), `step` reduces over data-parallel ranks, clips by the global norm, and updates. `fragments`
shows which range of which parameter this rank owns, without any communication; checkpoints are made of them.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model.names import NamedParameter, named_parameters
from ssa_megatron.parallel.context import Mpu, ParallelContext
from ssa_megatron.zero.ds_config import deepspeed_config


@dataclass(frozen=True)
class Fragment:
    """Elements `start .. start + numel` of a local parameter (row-major), whose optimizer state this rank owns.

    All tensors are 1-d views into live storage; `master`, `exp_avg`, `exp_avg_sq` are fp32, `working` has the model's dtype.
    """

    named: NamedParameter
    start: int
    numel: int
    working: Tensor
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class ShardedOptimizer:
    """AdamW under ZeRO for one model on this rank."""

    def __init__(self, model: torch.nn.Module, recipe: Recipe, context: ParallelContext):
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.recipe, self.context = recipe, context
        self.named = list(named_parameters(model, recipe, context))
        self.config = deepspeed_config(recipe, context.data_size)
        # DeepSpeed prints memory figures and advice about features that are switched off here on purpose
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            self.engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=self._adamw(),
                mpu=Mpu(context),
                config=self.config,
                dist_init_required=False,
            )
        self._inner = self.engine.optimizer.optimizer
        self._ensure_state()

    def _adamw(self) -> torch.optim.AdamW:
        o = self.recipe.optimizer
        parameters = [named.parameter for named in self.named]
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": o.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]
        fused = self.context.device.type == "cuda"
        return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, fused=fused)

    def gradient(self, parameter: torch.nn.Parameter) -> Tensor | None:
        """The gradient accumulated so far, in the parameter's shape: fp32 under bf16 training, else the parameter's own."""
        accumulated = getattr(
            parameter, "_hp_grad", None
        )  # exists after the first backward, only with fp32 accumulation
        return parameter.grad if accumulated is None else accumulated.view(parameter.shape)

    def finish_gradients(self) -> None:
        """After the last micro-batch: sum over tensor-parallel ranks what each of them saw for its own tokens only."""
        if not self.recipe.parallel.sequence:
            return
        for named in self.named:
            if getattr(named.parameter, "sequence_parallel", False):
                dist.all_reduce(self.gradient(named.parameter), group=self.context.tensor_group)

    def step(self, lr: float) -> tuple[float, bool]:
        """Reduce, clip, update at learning rate `lr`. Returns (global gradient norm before clipping, whether it was applied)."""
        for group in self._inner.param_groups:
            group["lr"] = lr
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return float(norm), self.engine.was_step_applied()

    def discard_gradients(self) -> None:
        """Forget the accumulated gradients: the step is skipped."""
        self.engine.optimizer.zero_grad()

    def fragments(self) -> Iterator[Fragment]:
        """This rank's share, in model order."""
        for named in self.named:
            mapping = named.parameter._hp_mapping
            if mapping is None:  # no element of this parameter lies in this rank's partition
                continue
            flat = self._inner.param_groups[mapping.param_group_index]["params"][0]
            state, at = self._inner.state[flat], mapping.hp_fragment_address
            here = mapping.lp_fragment_address
            yield Fragment(
                named=named,
                start=here.start,
                numel=here.numel,
                working=named.parameter.detach().view(-1).narrow(0, here.start, here.numel),
                master=flat.detach().narrow(0, at.start, at.numel),
                exp_avg=state["exp_avg"].narrow(0, at.start, at.numel),
                exp_avg_sq=state["exp_avg_sq"].narrow(0, at.start, at.numel),
            )

    @property
    def applied_steps(self) -> int:
        """Updates made so far: Adam's step count, equal in every group."""
        return int(self._inner.state[self._inner.param_groups[0]["params"][0]]["step"].item())

    def restored(self, applied_steps: int) -> None:
        """Call after masters and moments were written into `fragments`: sets Adam's step and refreshes the working weights."""
        for group in self._inner.param_groups:
            self._inner.state[group["params"][0]]["step"].fill_(float(applied_steps))
        self.engine.optimizer.update_lp_params()

    def _ensure_state(self) -> None:
        # torch creates Adam's state at its first step; checkpoints read and write it before that.
        for group in self._inner.param_groups:
            flat = group["params"][0]
            device = flat.device if group["fused"] else "cpu"
            self._inner.state[flat] = {
                "step": torch.zeros((), dtype=torch.float32, device=device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
