"""The run: claim the folder, build, restore, step until done, and leave every file the run folder promises.

All decisions that ranks must share (skip, stop, which checkpoint) are agreed here, in the same step on every rank. After any
death at most the steps since the last committed checkpoint are lost.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ssa_megatron.checkpoint.initial import check_start
from ssa_megatron.checkpoint.reader import load_into, newest_valid
from ssa_megatron.config import Recipe, digest
from ssa_megatron.errors import (
    EXIT_REQUEUE,
    CheckpointError,
    ConfigError,
    EnvironmentProblem,
    SSAError,
    TrainingStopped,
)
from ssa_megatron.model.build import build_model
from ssa_megatron.parallel import device as cpu
from ssa_megatron.parallel.state import ParallelState, finalize, initialize
from ssa_megatron.train.console import Console
from ssa_megatron.train.data import describe, open_data, open_stream
from ssa_megatron.train.evaluation import evaluate
from ssa_megatron.train.heartbeat import Heartbeat
from ssa_megatron.train.loggers import open_loggers
from ssa_megatron.train.metrics import Metrics
from ssa_megatron.train.profiler import StepProfiler
from ssa_megatron.train.restarts import Attempt
from ssa_megatron.train.run_folder import RunFolder, claim
from ssa_megatron.train.saving import Saver
from ssa_megatron.train.schedules import learning_rate
from ssa_megatron.train.signals import StopAsked, StopRequest
from ssa_megatron.train.step import train_step
from ssa_megatron.zero.optimizer import ShardedOptimizer
from ssa_pipelines import DatasetInfo, Tokenizer, TrainStream
from ssa_pipelines.errors import DataError


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


def train(recipe: Recipe, run: Path, *, stop: StopRequest, profile_steps: range = range(0)) -> int:
    """Train to the end, or until `stop` asks for an orderly one. Returns the exit code: 0, or 75 to be started again.

    stop: already listening. profile_steps: steps to record into RUN/profile/, numbered from 1.
    """
    infos, tokenizer = open_data(recipe)
    stop.meeting()
    parallel = initialize(recipe)
    stop.met()
    if recipe.attention.backend == "triton" and parallel.device.type == "cpu":
        raise ConfigError("attention.backend=triton needs a CUDA device", remedy="attention.backend=auto")
    console = Console(total_steps=recipe.train.steps, interval=recipe.logging.interval, enabled=parallel.is_rank0)
    console.phase(f"{parallel.world_size} process(es) on {parallel.device.type}, {parallel.describe()}")
    rows = parallel.run_on_all(lambda: open_stream(recipe, parallel.dp_rank, parallel.dp_size))
    folder = claim(run, recipe, parallel)
    if recipe.train.deterministic:
        torch.use_deterministic_algorithms(True)
    with Heartbeat(run, parallel, stop, recipe.watchdog) as beat:
        try:
            beat.exit_code = _train(
                recipe, folder, rows, infos, tokenizer, parallel, console, beat, stop, profile_steps
            )
        except StopAsked as asked:
            console.say(f"stopped by {asked}; the same command continues")
            beat.exit_code = EXIT_REQUEUE
        finalize()
    return beat.exit_code


def _train(
    recipe: Recipe,
    folder: RunFolder,
    rows: TrainStream,
    infos: dict[str, DatasetInfo],
    tokenizer: Tokenizer,
    parallel: ParallelState,
    console: Console,
    beat: Heartbeat,
    stop: StopRequest,
    profile_steps: range,
) -> int:
    """Raises StopAsked, on all ranks, for a stop that finds everything committed that there is to commit."""
    run = folder.path
    _enter("build", parallel, beat, stop)
    model = build_model(recipe, parallel)
    count = sum(p.numel() for p in model.parameters())  # now: ZeRO-3 leaves them empty
    optimizer = ShardedOptimizer(model, recipe, parallel)
    console.phase(f"model built: {recipe.attention.kind} attention, {count:,} parameters on this rank")
    _enter("restore", parallel, beat, stop)
    progress = _restore(run, recipe, tokenizer.fingerprint, optimizer, rows, parallel, console)
    parallel.run_on_rank0(lambda: folder.record(recipe, tokenizer.files, optimizer.config, parallel))
    console.phase(f"data: {describe(infos)}; starting at step {progress.step}")

    attempt = parallel.run_on_rank0(lambda: Attempt(run, step=progress.step, world=parallel.world_size))
    metrics = parallel.run_on_all(lambda: _open_metrics(run, recipe, progress.step) if parallel.is_rank0 else None)
    saver = Saver(run, optimizer, recipe, parallel, console, tokenizer.fingerprint)
    saver.newest = progress.step
    profiler = StepProfiler(profile_steps, run / "profile", parallel)
    _enter("first step", parallel, beat, stop)
    console.start()
    try:
        while progress.step < recipe.train.steps:
            profiler.before(progress.step + 1)
            values = _one_step(model, optimizer, rows, recipe, parallel, progress, console, saver, beat, stop)
            done = progress.step
            if written := profiler.after(done):
                console.say(written)
            last = done == recipe.train.steps
            interval = recipe.train.eval_interval
            if interval and (done % interval == 0 or last):
                beat.phase("evaluation", done)
                found = evaluate(model, recipe, parallel)
                values |= {f"eval/{name}": value for name, value in found.items()}
                console.say("  evaluation: " + "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
            if metrics is not None and (problem := metrics.write(done, values)):
                console.say(problem)
            beat.values = {"step": done, **values}
            # one agreement a step: to stop, and on the profile that a person asked the writer rank for
            beat.phase("agreement", done)
            asked, beat.asked = beat.asked, range(0)
            stopping, first, end = parallel.all_reduce_max(stop.reason is not None, asked.start, asked.stop)
            if end:
                late = "" if profiler.ask(first, end - 1, done) else "; that is too late"
                console.say(f"  a profile of steps {first} to {end - 1} was asked for{late}")
            if done % recipe.checkpoint.interval == 0 or last or stopping:
                beat.phase("save", done)
                saver.begin(progress, rows.state_dict())
                at_once = last or stopping or not recipe.checkpoint.asynchronous
                if at_once and not saver.finish() and (last or stopping):
                    raise _unsaved(run, done)
            if progress.skipped_in_a_row >= recipe.train.max_skipped_steps:
                raise TrainingStopped(
                    f"{progress.skipped_in_a_row} steps in a row had a non-finite loss or gradient; the last is step "
                    f"{done}, rows {rows.samples_seen - recipe.train.global_batch_rows}..{rows.samples_seen - 1} "
                    "of the stream",
                    remedy="look at those rows and at the learning rate; to go on from an earlier step, move newer "
                    f"checkpoints out of {run / 'checkpoints'}",
                )
            if stopping and not last:
                raise StopAsked(f"{stop.reason or 'a signal to another rank'} at step {done}")
        if parallel.is_rank0:
            attempt.end("done")
    except (SSAError, DataError, StopAsked) as error:
        if parallel.is_rank0:
            attempt.end(("stopped by " if isinstance(error, StopAsked) else "") + str(error).partition("\n")[0])
        raise
    finally:
        saver.close()
        profiler.close()
        if metrics is not None:
            metrics.close()
    rows.close()  # not on the way out early: its thread may hang in a read, and the process ends anyway
    memory = cpu.peak_memory() / 2**30
    console.phase(
        f"done: {recipe.train.steps} steps, {progress.tokens:,} tokens, {memory:.2f} GiB at most; run folder {run}"
    )
    return 0


def _open_metrics(run: Path, recipe: Recipe, resume_step: int) -> Metrics:
    loggers = open_loggers(recipe, run, resume_step=resume_step)
    return Metrics(run / "metrics.jsonl", resume_step=resume_step, loggers=loggers)


def _enter(phase: str, parallel: ParallelState, beat: Heartbeat, stop: StopRequest) -> None:
    """A phase of start-up begins, unless a rank was asked to stop: nothing of this start is worth a checkpoint yet."""
    beat.phase(phase, 0)
    if parallel.all_reduce_max(stop.reason is not None)[0]:
        raise StopAsked(f"{stop.reason or 'a signal to another rank'} before training went on; nothing to save")


def _one_step(
    model, optimizer, rows, recipe, parallel, progress: Progress, console: Console, saver: Saver, beat: Heartbeat, stop
) -> dict:
    lr, position = learning_rate(recipe, progress.applied_steps), rows.samples_seen
    try:
        result = train_step(
            model,
            optimizer,
            rows,
            recipe,
            parallel,
            step=progress.step,
            lr=lr,
            before_update=saver.finish,
            phase=lambda name: beat.phase(name, progress.step + 1),
            drawing=stop.interruptible,
        )
    except StopAsked as asked:  # while a rank waited for data: the run is where the step before left it
        beat.phase("save", progress.step)
        if saver.newest != progress.step:
            rows.samples_seen = position
            saver.begin(progress, rows.state_dict())
        if not saver.finish():
            raise _unsaved(saver.run, progress.step) from None
        raise StopAsked(f"{asked} at step {progress.step}, waiting for data") from None
    tokens = recipe.train.global_batch_rows * recipe.train.sequence_length
    progress.step += 1
    progress.tokens += tokens
    progress.applied_steps += result.applied
    progress.skipped_steps += not result.applied
    progress.skipped_in_a_row = 0 if result.applied else progress.skipped_in_a_row + 1
    values = {**asdict(result), "lr": lr, "tokens": progress.tokens, "skipped_steps": progress.skipped_steps}
    speed, seconds = console.step(progress.step, tokens, values)
    measured = {"tokens_per_second": round(speed, 1), "seconds": round(seconds, 4), "peak_memory": cpu.peak_memory()}
    return {**values, **measured, "checkpoint_wait": round(saver.waited, 4)}


def _unsaved(run: Path, step: int) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the run ends at step {step} and its checkpoint could not be written (see above)",
        remedy=f"make room at {run}, then give the same command again",
    )


def _restore(run, recipe, fingerprint, optimizer, rows, parallel, console: Console) -> Progress:
    checkpoint, rejected = newest_valid(run, parallel)
    for line in rejected:
        console.say(line)
    if checkpoint is None:
        return Progress()
    content = checkpoint.content
    if content.is_start:
        check_start(checkpoint, recipe)
    elif content.recipe_digest != digest(recipe):
        raise CheckpointError(
            f"{checkpoint.folder} was written with another recipe", remedy="give another folder with --run-folder"
        )
    if content.tokenizer_fingerprint != fingerprint:
        raise CheckpointError(
            f"{checkpoint.folder} was trained with tokenizer {content.tokenizer_fingerprint[:12]}, "
            f"the data has {fingerprint[:12]}",
            remedy="give the data the run was started with",
        )
    state = dict(content.state)
    if not content.is_start:
        rows.load_state_dict(state.pop("data"), accept_changes=recipe.data.accept_changes)
    progress = Progress(**state)
    if progress.skipped_in_a_row >= recipe.train.max_skipped_steps:
        raise TrainingStopped(
            f"{checkpoint.folder} was written after {progress.skipped_in_a_row} steps in a row with a non-finite loss",
            remedy="move it away to go on from the checkpoint before it",
        )
    load_into(checkpoint, optimizer, applied_steps=progress.applied_steps)
    console.phase(f"restored {checkpoint.folder.name}")
    return progress
