"""The run's checkpoints: when one is begun, when training waits for it, and what is said about it.

At most one is under way: begun right after a step, written by threads during the next one's forward and backward, finished
before that one's update. What a failed save costs is that checkpoint: training goes on, older ones are intact.
"""

import time
from dataclasses import asdict
from typing import TYPE_CHECKING

from ssa_megatron.checkpoint.writer import PendingCheckpoint, prune
from ssa_megatron.train.resume import Progress

if TYPE_CHECKING:
    from ssa_megatron.train.trainer import Trainer


class Saver:
    """Every rank holds one and calls it in the same step."""

    def __init__(self, trainer: "Trainer", *, newest: int):
        """newest: the step of the checkpoint that was restored, or 0."""
        self._run, self._optimizer, self._recipe = trainer.folder.path, trainer.optimizer, trainer.recipe
        self._parallel, self._console = trainer.parallel, trainer.console
        self._fingerprint = trainer.tokenizer.fingerprint
        self._pending: PendingCheckpoint | None = None
        self._began, self._keep = 0.0, True
        self._waited = 0.0
        self.newest = newest
        """The step whose checkpoint is committed, or was begun and has not failed."""

    def begin(self, progress: Progress, data: dict) -> None:
        """Begin the checkpoint of `progress.step`; `data` is the stream's position."""
        # While steps are being skipped the weights may be what makes them non-finite: such a checkpoint must not push good ones
        # out. The last step of a run is kept in addition to them.
        self._keep = progress.skipped_in_a_row == 0
        if not self._keep and progress.step < self._recipe.train.steps:
            self._console.say(
                f"  no checkpoint at step {progress.step}: it was skipped, and older checkpoints are the safer ones"
            )
            return
        self._began, self.newest = time.monotonic(), progress.step
        self._pending = PendingCheckpoint(
            self._run,
            self._optimizer,
            self._recipe,
            self._parallel,
            step=progress.step,
            state={**asdict(progress), "data": data},
            tokenizer_fingerprint=self._fingerprint,
        )

    def finish(self) -> bool:
        """Commit what was begun, if anything. False when it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return True
        waiting = time.monotonic()
        problem = pending.finish()
        if self._parallel.is_rank0 and self._keep and not problem:
            prune(self._run, self._recipe.checkpoint.keep, newest=pending.step)
        waited = time.monotonic() - waiting
        self._waited += waited
        if problem:
            self.newest = self.newest if problem.startswith("committed") else 0
            self._console.say(f"CHECKPOINT of step {pending.step} {problem}; older checkpoints are intact")
            return problem.startswith("committed")
        took = time.monotonic() - self._began
        self._console.say(f"  checkpoint step {pending.step} committed in {took:.2f} s; training waited {waited:.2f} s")
        return True

    def take_waited(self) -> float:
        """Seconds for which `finish` held the training thread since the last call."""
        waited, self._waited = self._waited, 0.0
        return waited

    def close(self) -> None:
        """The run ends: nothing is left writing."""
        if self._pending is not None:
            self._pending.abandon()
