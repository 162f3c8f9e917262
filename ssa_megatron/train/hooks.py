"""What happens around optimizer steps besides training: four named events, and the hooks that are always there.

The trainer calls hooks in list order, on every rank, in the same step. A hook may call collectives; it may add figures to the
step's values, which later hooks see. To watch training, write a Hook and pass it to the Trainer.
"""

from typing import TYPE_CHECKING

from ssa_megatron.train.evaluation import evaluate
from ssa_megatron.train.metrics import Metrics

if TYPE_CHECKING:
    from ssa_megatron.train.trainer import Trainer


class Hook:
    """The events; each does nothing unless a subclass defines it. Steps are numbered from 1."""

    def on_start(self, trainer: "Trainer") -> None:
        """Model, optimizer and position are restored; the first step comes next."""

    def before_step(self, step: int) -> None:
        """Step `step` begins."""

    def after_step(self, step: int, values: dict) -> None:
        """Step `step` is done, not yet saved; `values` are the figures of its line in metrics.jsonl."""

    def on_end(self) -> None:
        """Training ends, with or without an error; called for hooks whose `on_start` returned, the last one first."""


class EvaluationHook(Hook):
    """The held-out loss every `train.eval_interval` steps and at the last one."""

    def on_start(self, trainer: "Trainer") -> None:
        self._trainer = trainer

    def after_step(self, step: int, values: dict) -> None:
        t, train = self._trainer, self._trainer.recipe.train
        if not train.eval_interval or (step % train.eval_interval and step != train.steps):
            return
        t.heartbeat.phase("evaluation", step)
        found = evaluate(t.model, t.recipe, t.parallel)
        values |= {f"eval/{name}": value for name, value in found.items()}
        t.console.say("  evaluation: " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))


class MetricsHook(Hook):
    """metrics.jsonl and the loggers, on rank 0; the newest figures for metrics.prom."""

    def __init__(self) -> None:
        self._metrics: Metrics | None = None

    def on_start(self, trainer: "Trainer") -> None:
        self._trainer = trainer
        step = trainer.progress.step
        self._metrics = trainer.parallel.run_on_all(
            lambda: Metrics.open(trainer.recipe, trainer.folder.path, step) if trainer.parallel.is_rank0 else None
        )

    def after_step(self, step: int, values: dict) -> None:
        if self._metrics is not None and (problem := self._metrics.write(step, values)):
            self._trainer.console.say(problem)
        self._trainer.heartbeat.values = {"step": step, **values}

    def on_end(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
