"""Where a run stands, and how a start finds that again: counters, the newest valid checkpoint, what must belong together."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssa_megatron.checkpoint.initial import check_start
from ssa_megatron.checkpoint.reader import load_into, newest_valid
from ssa_megatron.config import digest, resolve
from ssa_megatron.errors import CheckpointError, TrainingStopped

if TYPE_CHECKING:
    from ssa_megatron.train.trainer import Trainer


@dataclass
class Progress:
    """Counters of a run; saved with every checkpoint, equal on every rank."""

    step: int = 0
    """Global batches consumed: the number of the next step."""
    applied_steps: int = 0
    """Optimizer updates made; the learning rate follows this one."""
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    tokens: int = 0
    """Tokens in all rows consumed."""

    def count(self, *, applied: bool, tokens: int) -> None:
        """One more step of `tokens` tokens."""
        self.step += 1
        self.tokens += tokens
        self.applied_steps += applied
        self.skipped_steps += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1


def restore(trainer: "Trainer") -> Progress:
    """Load the newest valid checkpoint into the trainer's optimizer and data stream; a new run's counters without one.

    Raises CheckpointError, on all ranks, for a checkpoint of another recipe or tokenizer; TrainingStopped for one that was
    written while every step was being skipped.
    """
    recipe, console = trainer.recipe, trainer.console
    checkpoint, rejected = newest_valid(trainer.folder.path, trainer.parallel)
    for line in rejected:
        console.say(line)
    if checkpoint is None:
        return Progress()
    content = checkpoint.content
    if content.is_start:
        check_start(checkpoint, recipe)
    elif digest(resolve(content.recipe, origin=str(checkpoint.folder))) != digest(recipe):
        raise CheckpointError(
            f"{checkpoint.folder} was written with another recipe",
            remedy="give another folder with --run-folder",
            id="another-recipe",
        )
    fingerprint = trainer.tokenizer.fingerprint
    if content.tokenizer_fingerprint != fingerprint:
        raise CheckpointError(
            f"{checkpoint.folder} was trained with tokenizer {content.tokenizer_fingerprint[:12]}, "
            f"the data has {fingerprint[:12]}",
            remedy="give the data the run was started with",
            id="another-tokenizer",
        )
    state = dict(content.state)
    if not content.is_start:
        trainer.rows.load_state_dict(state.pop("data"), accept_changes=recipe.data.accept_changes)
    progress = Progress(**state)
    if progress.skipped_in_a_row >= recipe.train.max_skipped_steps:
        raise TrainingStopped(
            f"{checkpoint.folder} was written after {progress.skipped_in_a_row} steps in a row with a non-finite loss",
            remedy="move it away to go on from the checkpoint before it",
            id="saved-while-skipping",
        )
    load_into(checkpoint, trainer.optimizer, applied_steps=progress.applied_steps)
    console.phase(f"restored {checkpoint.folder.name}")
    return progress
