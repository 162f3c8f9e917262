"""What an optimizer is: a torch optimizer, its state tensors by name, and the answers that ZeRO, checkpoints and planner ask for.

Every state tensor is fp32 and has one element per parameter, so that it is sharded, stored and loaded as the master weights
are. This module and the optimizers import no torch at import time, because `ssa plan` reads them.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ssa_megatron.config.sections import Optimizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class OptimizerKind(ABC):
    """One optimizer. Subclasses set the class attributes and register themselves in `config.variants.OPTIMIZERS`."""

    state: ClassVar[tuple[str, ...]]
    """Keys of the state tensors in the torch optimizer's `state`; checkpoints store the tensors under these names."""
    step_count: ClassVar[str | None] = "step"
    """Key of the number of updates (an fp32 scalar) in the torch optimizer's `state`; None if it keeps no count."""
    whole_matrices: ClassVar[bool] = False
    """Whether an update needs whole matrices. ZeRO passes flat ranges of parameters, so such an optimizer is refused today."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        taken = {"master", "weight"} & set(getattr(cls, "state", ()))
        if taken:
            raise TypeError(f"{cls.__name__}.state: {', '.join(taken)} is a name that checkpoints use for weights")

    def __init__(self, settings: Optimizer):
        self.settings = settings

    @abstractmethod
    def build(self, parameters: "Sequence[torch.nn.Parameter]", *, fused: bool) -> "torch.optim.Optimizer":
        """The torch optimizer over `parameters`, in model order; learning rates are set before every step.

        fused: whether torch's fused implementations run on the device that holds the state.
        """

    def groups(self, parameters: "Sequence[torch.nn.Parameter]") -> list[dict[str, Any]]:
        """Parameter groups: matrices decay by `optimizer.weight_decay`, vectors (norms) do not."""
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": self.settings.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]

    def initial_state(self, flat: "Tensor", *, fused: bool) -> "dict[str, Tensor]":
        """The state before the first update, for fp32 masters `flat` (1-d): zeros.

        torch creates it at the first update; a checkpoint may be loaded before. fused: the step count lies on the device too.
        """
        import torch

        found = {}
        if self.step_count is not None:
            found[self.step_count] = torch.zeros((), dtype=torch.float32, device=flat.device if fused else "cpu")
        return found | {name: torch.zeros_like(flat) for name in self.state}

    @property
    def bytes_per_parameter(self) -> int:
        """Of the state, without the fp32 master."""
        return 4 * len(self.state)
