"""The run: claim the folder, build, restore, step until done, and leave every file the run folder promises.

The Trainer owns model, optimizer, data, saver and hooks. All decisions that ranks must share (skip, stop, which checkpoint) are
taken here, in the same step on every rank. After any crash at most the steps since the last committed checkpoint are lost.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ssa_megatron.config import Recipe
from ssa_megatron.errors import EXIT_REQUEUE, ConfigError, EnvironmentProblem, SSAError, TrainingStopped
from ssa_megatron.model.build import build_model
from ssa_megatron.parallel import device
from ssa_megatron.parallel.state import finalize, initialize
from ssa_megatron.train.console import Console
from ssa_megatron.train.data import describe, open_data, open_stream
from ssa_megatron.train.heartbeat import Heartbeat
from ssa_megatron.train.hooks import EvaluationHook, Hook, MetricsHook
from ssa_megatron.train.profiler import StepProfiler
from ssa_megatron.train.restarts import Attempt
from ssa_megatron.train.resume import Progress, restore
from ssa_megatron.train.run_folder import claim
from ssa_megatron.train.saving import Saver
from ssa_megatron.train.schedules import schedule_of
from ssa_megatron.train.signals import StopAsked, StopRequest
from ssa_megatron.train.step import StepResult, StepRunner
from ssa_megatron.zero.optimizer import ShardedOptimizer
from ssa_pipelines.errors import DataError


class Trainer:
    """One rank's part of a run. Every rank constructs one and calls `run`."""

    def __init__(
        self,
        recipe: Recipe,
        run: Path,
        *,
        stop: StopRequest,
        profile_steps: range = range(0),
        hooks: Sequence[Hook] = (),
    ):
        """Open the data, join the other ranks, and claim the run folder.

        stop: already listening. profile_steps: steps to record into RUN/profile/, numbered from 1. hooks: called after
        evaluation and before metrics are written, so that what they add to a step's values is recorded. Raises the errors of
        `open_data`, `initialize` and `claim`.
        """
        self.recipe, self.stop, self.schedule = recipe, stop, schedule_of(recipe)
        datasets, self.tokenizer = open_data(recipe)
        stop.meeting()
        self.parallel = initialize(recipe)
        stop.met()
        if recipe.attention.backend == "triton" and self.parallel.device.type == "cpu":
            raise ConfigError(
                "attention.backend=triton needs a CUDA device", remedy="attention.backend=auto", id="triton-on-cpu"
            )
        self.console = Console(recipe.train.steps, recipe.logging.interval, enabled=self.parallel.is_rank0)
        self.console.phase(
            f"{self.parallel.world_size} process(es) on {self.parallel.device.type}, {self.parallel.describe()}"
        )
        self.data_summary = describe(datasets)
        self.rows = self.parallel.run_on_all(lambda: open_stream(recipe, self.parallel.dp_rank, self.parallel.dp_size))
        self.folder = claim(run, recipe, self.parallel)
        self.profiler = StepProfiler(profile_steps, run / "profile", self.parallel, self.console)
        self.hooks = [self.profiler, EvaluationHook(), *hooks, MetricsHook()]
        if recipe.train.deterministic:
            torch.use_deterministic_algorithms(True)

    def run(self) -> int:
        """Train to the end, or until the stop request. Returns the exit code: 0, or 75 for the same command to be run again."""
        with Heartbeat(self.folder.path, self.parallel, self.stop, self.recipe.watchdog) as self.heartbeat:
            try:
                self._prepare()
                self._fit()
                self.heartbeat.exit_code = 0
            except StopAsked as asked:
                self.console.say(f"stopped by {asked}; the same command continues")
                self.heartbeat.exit_code = EXIT_REQUEUE
            finalize()
        return self.heartbeat.exit_code

    def _prepare(self) -> None:
        """Build model and optimizer, restore the newest checkpoint, and record what is about to run."""
        recipe, run = self.recipe, self.folder.path
        self._enter("build")
        self.model = build_model(recipe, self.parallel)
        count = sum(p.numel() for p in self.model.parameters())  # now: ZeRO-3 leaves them empty
        self.optimizer = ShardedOptimizer(self.model, recipe, self.parallel)
        self.runner = StepRunner(self.model, self.optimizer, recipe, self.parallel)
        self.console.phase(f"model built: {recipe.attention.kind} attention, {count:,} parameters on this rank")
        self._enter("restore")
        self.progress: Progress = restore(self)
        self.parallel.run_on_rank0(
            lambda: self.folder.record(recipe, self.tokenizer.files, self.optimizer.config, self.parallel)
        )
        self.console.phase(f"data: {self.data_summary}; starting at step {self.progress.step}")
        self.attempt = self.parallel.run_on_rank0(
            lambda: Attempt(run, step=self.progress.step, world=self.parallel.world_size)
        )
        self.saver = Saver(self, newest=self.progress.step)

    def _enter(self, phase: str) -> None:
        """A phase of start-up begins, unless a rank was asked to stop: nothing of this start is worth a checkpoint yet."""
        self.heartbeat.phase(phase, 0)
        if self.parallel.all_reduce_max(self.stop.reason is not None)[0]:
            raise StopAsked(
                f"{self.stop.reason or 'a signal to another rank'} before training went on; nothing to save"
            )

    def _fit(self) -> None:
        """Step until done. Raises StopAsked, on all ranks, once the newest step is committed."""
        recipe, run = self.recipe, self.folder.path
        with contextlib.ExitStack() as ending:
            ending.callback(self.saver.close)
            try:
                for hook in self.hooks:
                    hook.on_start(self)
                    ending.callback(hook.on_end)
                self._enter("first step")
                self.console.start()
                while self.progress.step < recipe.train.steps:
                    self._advance()
                if self.parallel.is_rank0:
                    self.attempt.end("done")
            except (SSAError, DataError, StopAsked) as error:
                if self.parallel.is_rank0:
                    reason = str(error).partition("\n")[0]
                    self.attempt.end(f"stopped by {reason}" if isinstance(error, StopAsked) else reason)
                raise
        self.rows.close()  # skipped on errors: the reader thread may hang
        memory = device.peak_memory() / 2**30
        self.console.phase(
            f"done: {recipe.train.steps} steps, {self.progress.tokens:,} tokens, {memory:.2f} GiB at most; run folder {run}"
        )

    def _advance(self) -> None:
        """One step, its hooks, its checkpoint when one is due, and the decision to go on."""
        step = self.progress.step + 1
        for hook in self.hooks:
            hook.before_step(step)
        values = self._step(step)
        for hook in self.hooks:
            hook.after_step(step, values)
        stopping = self._agree(step)
        self._save(step, stopping)
        if self.progress.skipped_in_a_row >= self.recipe.train.max_skipped_steps:
            raise self._skipped_too_often(step)
        if stopping and step < self.recipe.train.steps:
            raise StopAsked(f"{self.stop.reason or 'a signal to another rank'} at step {step}")

    def _step(self, step: int) -> dict:
        """The optimizer step; returns the figures of its line in metrics.jsonl."""
        before = self.rows.samples_seen
        lr = self.schedule.lr(self.progress.applied_steps)
        self.heartbeat.phase("data", step)
        try:
            drawn = self.runner.draw(self.rows, step=step - 1, waiting=self.stop.interruptible())
        except StopAsked as asked:
            raise self._stopped_while_waiting(asked, before) from None
        self.heartbeat.phase("compute", step)
        losses = self.runner.compute(drawn)
        self.heartbeat.phase("save", step)
        self.saver.finish()  # of the step before: its threads read the state that the update changes
        self.heartbeat.phase("update", step)
        return self._record(self.runner.update(drawn, losses, lr=lr), lr)

    def _record(self, result: StepResult, lr: float) -> dict:
        tokens = self.recipe.train.global_batch_rows * self.recipe.train.sequence_length
        self.progress.count(applied=result.applied, tokens=tokens)
        counters = {"lr": lr, "tokens": self.progress.tokens, "skipped_steps": self.progress.skipped_steps}
        values = {**asdict(result), **counters}
        speed, seconds = self.console.step(self.progress.step, tokens, values)
        return {
            **values,
            "tokens_per_second": round(speed, 1),
            "seconds": round(seconds, 4),
            "peak_memory": device.peak_memory(),
            "checkpoint_wait": round(self.saver.take_waited(), 4),
        }

    def _agree(self, step: int) -> bool:
        """The agreement at the end of a step: whether to stop, and on the profile that `ssa profile` asked rank 0 for."""
        self.heartbeat.phase("agreement", step)
        asked, self.heartbeat.asked = self.heartbeat.asked, range(0)
        stopping, first, end = self.parallel.all_reduce_max(self.stop.reason is not None, asked.start, asked.stop)
        if end:
            refused = "" if self.profiler.ask(first, end - 1, step) else "; it is too late, or another one is pending"
            self.console.say(f"  a profile of steps {first} to {end - 1} was asked for{refused}")
        return bool(stopping)

    def _save(self, step: int, stopping: bool) -> None:
        """Begin the checkpoint that is due after `step`; finish it at once where nothing would finish it later."""
        settings, ending = self.recipe.checkpoint, stopping or step == self.recipe.train.steps
        if step % settings.interval and not ending:
            return
        self.heartbeat.phase("save", step)
        self.saver.begin(self.progress, self.rows.state_dict())
        if (ending or not settings.asynchronous) and not self.saver.finish() and ending:
            raise self._unsaved(step)

    def _stopped_while_waiting(self, asked: StopAsked, samples_seen: int) -> BaseException:
        """A stop while a rank waited for data: the run is where the step before left it, and that is committed."""
        step = self.progress.step
        self.heartbeat.phase("save", step)
        if self.saver.newest != step:
            self.rows.samples_seen = samples_seen
            self.saver.begin(self.progress, self.rows.state_dict())
        if not self.saver.finish():
            return self._unsaved(step)
        return StopAsked(f"{asked} at step {step}, waiting for data")

    def _unsaved(self, step: int) -> EnvironmentProblem:
        return EnvironmentProblem(
            f"the run ends at step {step} and its checkpoint could not be written (see above)",
            remedy=f"free disk space at {self.folder.path}, then run the same command again",
            id="checkpoint-not-written",
        )

    def _skipped_too_often(self, step: int) -> TrainingStopped:
        last = self.rows.samples_seen - 1
        return TrainingStopped(
            f"{self.progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient; the last is step {step}, "
            f"rows {last + 1 - self.recipe.train.global_batch_rows}..{last} of the stream",
            remedy="look at those rows and at the learning rate; to go on from an earlier step, move newer checkpoints "
            f"out of {self.folder.path / 'checkpoints'}",
            id="non-finite-loss",
        )
