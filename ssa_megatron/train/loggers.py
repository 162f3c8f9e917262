"""Loggers: copies of metrics.jsonl for TensorBoard, Weights & Biases and others; one class per logger.

A restart continues the same curves. A logger that raises while it logs is switched off with a message, and training goes on:
metrics.jsonl is the source of record. To add a logger, add a class here; recipes switch it on in `logging.loggers`.
"""

import contextlib
import secrets
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from ssa_megatron.config import Recipe
from ssa_megatron.config.variants import LOGGERS
from ssa_megatron.errors import EnvironmentProblem
from ssa_megatron.files import replace_durably


class Logger(ABC):
    """One logger of one run, on rank 0. Subclasses register themselves in `config.variants.LOGGERS`."""

    title: ClassVar[str]
    """Its name in messages: "Weights & Biases"."""

    def __init__(self, argument: str):
        """argument: what the recipe gives for it, such as a folder, a project or an address."""
        self.argument = argument

    @abstractmethod
    def start(self, recipe: Recipe, run: Path, *, resume_step: int) -> None:
        """Called once, before the first step. Steps after `resume_step` that an earlier start logged are repeated.

        Raises EnvironmentProblem when the logger cannot work here.
        """

    @abstractmethod
    def log(self, step: int, values: dict[str, float]) -> None:
        """The figures of `step`, numbered from 1."""

    @abstractmethod
    def close(self) -> None:
        """The run ends, with or without an error."""


@LOGGERS.register("tensorboard")
class TensorBoard(Logger):
    """Event files in folder `argument` of the run folder. Readers purge what an earlier start wrote after `resume_step`."""

    title = "TensorBoard"

    def start(self, recipe: Recipe, run: Path, *, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run / self.argument), purge_step=resume_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


@LOGGERS.register("wandb")
class WeightsAndBiases(Logger):
    """One run of project `argument` for all starts, by the id in RUN/wandb-id.

    W&B keeps the first value of a step. That is right for steps that run again after a crash: they have the same figures,
    because a resumed run equals the uninterrupted one bit for bit.
    """

    title = "Weights & Biases"

    def start(self, recipe: Recipe, run: Path, *, resume_step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                f"logging.wandb={self.argument}, and wandb cannot be imported: {error}",
                remedy="pip install wandb, or logging.wandb=null",
                id="wandb-missing",
            ) from None
        identity = run / "wandb-id"
        if not identity.exists():
            replace_durably(identity, secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=self.argument,
                id=identity.read_text().strip(),
                name=run.resolve().name,
                resume="allow",
                dir=str(run),
                config=recipe.model_dump(mode="json"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise EnvironmentProblem(
                f"logging.wandb={self.argument}: {type(error).__name__}: {error}",
                remedy="wandb login, or WANDB_MODE=offline and `wandb sync` later, or logging.wandb=null",
                id="wandb-not-started",
            ) from None

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Loggers:
    """All of a run's loggers, as one."""

    def __init__(self, loggers: list[Logger]):
        """loggers: already started."""
        self._loggers = loggers

    def log(self, step: int, values: dict[str, Any]) -> str | None:
        """Log the numbers among `values`. Returns None, or a message about a logger that is switched off from now on."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        problem = None
        for logger in list(self._loggers):
            try:
                logger.log(step, numbers)
            except Exception as error:  # third-party code, and only a copy of what metrics.jsonl has
                self._loggers.remove(logger)
                problem = f"{logger.title} is switched off: {type(error).__name__}: {error}"
        return problem

    def close(self) -> None:
        for logger in self._loggers:
            with contextlib.suppress(Exception):
                logger.close()


def open_loggers(recipe: Recipe, run: Path, *, resume_step: int) -> Loggers:
    """Start the loggers that the recipe's logging section asks for."""
    settings, asked = recipe.logging, {}
    if settings.tensorboard:
        asked["tensorboard"] = "tensorboard"
    if settings.wandb:
        asked["wandb"] = settings.wandb
    loggers = [LOGGERS[name](argument) for name, argument in (asked | settings.loggers).items()]
    for logger in loggers:
        logger.start(recipe, run, resume_step=resume_step)
    return Loggers(loggers)
