"""An optimizer, a schedule and a logger from outside the package: what a newcomer writes, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ssa_megatron.config.variants import LOGGERS, OPTIMIZERS, SCHEDULES
from ssa_megatron.optim.base import OptimizerKind
from ssa_megatron.train.loggers import Logger
from ssa_megatron.train.schedules import LearningRate


class Momentum(OptimizerKind):
    """Gradient descent with momentum: one state tensor, no step count."""

    state = ("momentum_buffer",)
    step_count = None

    def build(self, parameters, *, fused):
        return torch.optim.SGD(self.groups(parameters), lr=self.settings.lr, momentum=self.settings.beta1)


class Halving(LearningRate):
    """Half of the rate before, at every step; only without a floor."""

    @classmethod
    def broken_rule(cls, recipe):
        if recipe.schedule.min_lr_ratio:
            return "halving-has-no-floor", "schedule.min_lr_ratio must be 0 with schedule.kind=halving"
        return None

    def factor(self, applied_steps):
        return 0.5 ** (applied_steps - self.warmup)


class Recorder(Logger):
    """Appends one line per step to file `argument` of the run folder."""

    title = "Recorder"

    def start(self, recipe, run, *, resume_step):
        self.file = (run / self.argument).open("a")
        self.file.write(f"start after {resume_step}\n")

    def log(self, step, values):
        self.file.write(f"step {step} loss {values['loss'].hex()} lr {values['lr'].hex()}\n")

    def close(self):
        self.file.write("closed\n")
        self.file.close()


@contextmanager
def registered() -> Iterator[None]:
    """Inside, recipes may name them: `momentum`, `halving`, `recorder`."""
    OPTIMIZERS.register("momentum")(Momentum)
    SCHEDULES.register("halving")(Halving)
    LOGGERS.register("recorder")(Recorder)
    yield
    OPTIMIZERS.unregister("momentum")
    SCHEDULES.unregister("halving")
    LOGGERS.unregister("recorder")
