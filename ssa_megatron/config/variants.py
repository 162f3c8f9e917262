"""The fields of a recipe that name a variant, and where the variants live. Reading a recipe checks the name, and no more."""

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from ssa_megatron.registry import Registry

if TYPE_CHECKING:
    from ssa_megatron.model.kinds.base import AttentionKind
    from ssa_megatron.optim.base import OptimizerKind
    from ssa_megatron.train.loggers import Logger
    from ssa_megatron.train.schedules import LearningRate

KINDS: "Registry[type[AttentionKind]]" = Registry(
    "attention.kind", "ssa_megatron.model.kinds", helpers=("base", "streams")
)
OPTIMIZERS: "Registry[type[OptimizerKind]]" = Registry("optimizer.kind", "ssa_megatron.optim")
SCHEDULES: "Registry[type[LearningRate]]" = Registry("schedule.kind", "ssa_megatron.train.schedules")
LOGGERS: "Registry[type[Logger]]" = Registry("logging.loggers", "ssa_megatron.train.loggers")


def _known(registry: Registry) -> AfterValidator:
    def check(name: str) -> str:
        if name not in registry:
            known = ", ".join(registry.names())
            raise PydanticCustomError("unknown-variant-name", "Input should be one of {known}", {"known": known})
        return name

    return AfterValidator(check)


KindName = Annotated[str, _known(KINDS)]
OptimizerName = Annotated[str, _known(OPTIMIZERS)]
ScheduleName = Annotated[str, _known(SCHEDULES)]
LoggerName = Annotated[str, _known(LOGGERS)]
