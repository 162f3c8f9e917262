"""Where DeepSpeed keeps this rank's masters and optimizer state, and how its gradients are discarded: one class per sharding.

`SharedWeights` (ZeRO-1 and 2): every rank holds all weights; one flat master per parameter group is cut into ranges of the
parameters. `PartitionedWeights` (ZeRO-3): a rank holds its padded range of every weight, flat per sub-group. Both yield live
views and call no collective to do so. These attributes are not DeepSpeed's public interface: nothing else touches them.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ssa_megatron.model.names import NamedParameter
from ssa_megatron.optim.base import OptimizerKind


@dataclass(frozen=True)
class Fragment:
    """Elements `start .. start + numel` of a local parameter (row-major), whose optimizer state this rank owns.

    All tensors are 1-d views into live storage; `master` and `state` are fp32, `working` has the model's dtype. They keep their
    contents from one optimizer step to the next: forward, backward and evaluation only read them.
    """

    named: NamedParameter
    start: int
    numel: int
    working: Tensor
    master: Tensor
    state: dict[str, Tensor]
    """By the names of `OptimizerKind.state`."""

    @property
    def stored(self) -> dict[str, Tensor]:
        """What a checkpoint needs to continue, by the names it has there: `master` and the state."""
        return {"master": self.master, **self.state}


class Shards(ABC):
    """What both classes share: the state of each flat master is in the inner optimizer's `state`."""

    def __init__(self, optimizer, named: list[NamedParameter], kind: OptimizerKind):
        """optimizer: DeepSpeed's, which wraps what `kind` built as `.optimizer`."""
        self._optimizer, self._inner, self._named, self._kind = optimizer, optimizer.optimizer, named, kind
        for flat in self.flats():
            self._inner.state[flat] = kind.initial_state(flat, fused=bool(self._inner.defaults.get("fused")))

    @abstractmethod
    def flats(self) -> list[Tensor]:
        """The flat fp32 masters that the inner optimizer updates."""

    @abstractmethod
    def fragments(self) -> Iterator[Fragment]:
        """This rank's share, in model order."""

    @abstractmethod
    def refresh(self) -> None:
        """Working weights from masters, on every rank (collective)."""

    def discard_gradients(self) -> None:
        """Forget what was accumulated since the last step."""
        self._optimizer.zero_grad()

    @property
    def step_count(self) -> int | None:
        """Updates made so far, equal in every flat; None if the optimizer keeps no count."""
        key = self._kind.step_count
        return None if key is None else int(self._inner.state[self.flats()[0]][key].item())

    @step_count.setter
    def step_count(self, value: int) -> None:
        if self._kind.step_count is not None:
            for flat in self.flats():
                self._inner.state[flat][self._kind.step_count].fill_(float(value))

    def _fragment(self, named: NamedParameter, start: int, flat: Tensor, at: int, working: Tensor) -> Fragment:
        state, numel = self._inner.state[flat], working.numel()
        return Fragment(
            named=named,
            start=start,
            numel=numel,
            working=working,
            master=flat.detach().narrow(0, at, numel),
            state={name: state[name].narrow(0, at, numel) for name in self._kind.state},
        )


class SharedWeights(Shards):
    """ZeRO-1 and 2."""

    def flats(self) -> list[Tensor]:
        return [group["params"][0] for group in self._inner.param_groups]

    def fragments(self) -> Iterator[Fragment]:
        for named in self._named:
            mapping = named.parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
            if mapping is None:  # no element of this parameter lies in this rank's partition
                continue
            flat = self.flats()[mapping.param_group_index]
            here = mapping.lp_fragment_address
            working = named.parameter.detach().view(-1).narrow(0, here.start, here.numel)
            yield self._fragment(named, here.start, flat, mapping.hp_fragment_address.start, working)

    def refresh(self) -> None:
        self._optimizer.update_lp_params()

    def discard_gradients(self) -> None:
        super().discard_gradients()
        if not getattr(self._optimizer, "partition_gradients", False):
            return
        # ZeRO-2 has reduced them into partitions already, and forgets those only at the end of a step
        for partitions in (self._optimizer.averaged_gradients, self._optimizer.all_grad_tensors):
            for group in partitions:
                partitions[group] = None
        self._optimizer.micro_step_id = -1  # what step() sets: the next micro-batch is the first
        self._optimizer._offload_accumulated_param_ids = set()


class PartitionedWeights(Shards):
    """ZeRO-3. A parameter's range on rank r starts at r * partition_numel; the last ones may be short, or empty."""

    def flats(self) -> list[Tensor]:
        return self._optimizer.fp32_partitioned_groups_flat

    def fragments(self) -> Iterator[Fragment]:
        for named in self._named:
            parameter: Any = named.parameter  # with DeepSpeed's attributes
            group, at, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start = padded * self._optimizer._get_param_partition_rank(parameter)
            numel = min(padded, parameter.ds_numel - start)
            if numel > 0:
                working = parameter.ds_tensor.detach().view(-1).narrow(0, 0, numel)
                yield self._fragment(named, start, self.flats()[group], at, working)

    def refresh(self) -> None:
        optimizer = (
            self._optimizer
        )  # the end of its step(): free gathered weights, copy, gather those that stay gathered
        optimizer._partition_all_parameters()
        for group in range(len(self.flats())):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
