"""Where figures are drawn beside metrics.jsonl: TensorBoard's event files, and Weights & Biases where somebody asks for it.

Both go on after a restart as one curve. They are copies: a logger that breaks is switched off, with a sentence, and training
goes on.
"""

import contextlib
import secrets
from pathlib import Path
from typing import Protocol

from ssa_megatron.config import Recipe
from ssa_megatron.errors import EnvironmentProblem
from ssa_megatron.files import replace_durably


class Logger(Protocol):
    name: str

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in `folder`; what an earlier start wrote after `resume_step` is purged by the reader."""

    name = "TensorBoard"

    def __init__(self, folder: Path, *, resume_step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run of `project` for all starts, by the id in RUN/wandb-id.

    Steps that run again after a crash have the figures they had (a resume is bit for bit the uninterrupted run), so that W&B,
    which keeps the first value of a step, is right to ignore them.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, run: Path, recipe: Recipe):
        """Raises EnvironmentProblem when wandb is not installed, or does not let us in."""
        try:
            import wandb
        except ImportError as error:
            raise EnvironmentProblem(
                f"logging.wandb={project}, and wandb cannot be imported: {error}",
                remedy="pip install wandb, or logging.wandb=null",
                id="wandb-missing",
            ) from None
        identity = run / "wandb-id"
        if not identity.exists():
            replace_durably(identity, secrets.token_hex(4) + "\n")
        try:
            self._run = wandb.init(
                project=project,
                id=identity.read_text().strip(),
                name=run.resolve().name,
                resume="allow",
                dir=str(run),
                config=recipe.model_dump(mode="json"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise EnvironmentProblem(
                f"logging.wandb={project}: {type(error).__name__}: {error}",
                remedy="wandb login, or WANDB_MODE=offline and `wandb sync` later, or logging.wandb=null",
                id="wandb-not-started",
            ) from None

    def write(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Loggers:
    """All of a run's loggers, as one."""

    def __init__(self, loggers: list[Logger]):
        self._boards = loggers

    def write(self, step: int, values: dict) -> str | None:
        """The numbers among `values`; None, or a sentence about a logger that is off from here on."""
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        problem = None
        for logger in list(self._boards):
            try:
                logger.write(step, numbers)
            except Exception as error:  # other people's code, and only a copy of what metrics.jsonl has
                self._boards.remove(logger)
                problem = f"{logger.name} is off from here on: {type(error).__name__}: {error}"
        return problem

    def close(self) -> None:
        for logger in self._boards:
            with contextlib.suppress(Exception):
                logger.close()


def open_loggers(recipe: Recipe, run: Path, *, resume_step: int) -> Loggers:
    """Those that the recipe's logging section asks for."""
    loggers: list[Logger] = []
    if recipe.logging.tensorboard:
        loggers.append(TensorBoard(run / "tensorboard", resume_step=resume_step))
    if recipe.logging.wandb:
        loggers.append(WeightsAndBiases(recipe.logging.wandb, run, recipe))
    return Loggers(loggers)
