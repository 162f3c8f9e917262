"""A recipe's data section, opened: datasets that fit the model, the training stream, the evaluation rows, and the ledger.

It refuses, before training, data that a run of this recipe could not use to its end.
"""

from collections.abc import Iterator
from pathlib import Path

import ssa_pipelines
from ssa_megatron.config import Recipe
from ssa_megatron.errors import ConfigError
from ssa_megatron.parallel.state import ParallelState


def access(recipe: Recipe) -> ssa_pipelines.Access:
    """How remote datasets are reached."""
    return ssa_pipelines.Access(recipe.data.cache, recipe.data.cache_limit, recipe.data.stall_timeout)


def open_data(recipe: Recipe) -> tuple[dict[str, ssa_pipelines.DatasetInfo], ssa_pipelines.Tokenizer]:
    """The datasets by source name, and their tokenizer. Raises ConfigError or DataError for what does not fit."""
    infos = ssa_pipelines.open_sources(_sources(recipe), access(recipe))
    tokenizer = ssa_pipelines.Tokenizer.load(next(iter(infos.values())).tokenizer_path)
    for info in infos.values():
        ssa_pipelines.check_compatible(
            info,
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=recipe.model.vocab_size,
            row_length=recipe.train.sequence_length,
        )
    if recipe.train.eval_interval:
        _check_evaluation(recipe, infos)
    return infos, tokenizer


def describe(infos: dict[str, ssa_pipelines.DatasetInfo]) -> str:
    """One line: tokens and rows of the training split, over all sources."""
    splits = [info.split("train") for info in infos.values()]
    names = f" of {len(infos)} sources" if len(infos) > 1 else ""
    return f"{sum(split.tokens for split in splits):,} tokens in {sum(split.rows for split in splits):,} rows{names}"


def open_stream(recipe: Recipe, rank: int, size: int) -> ssa_pipelines.TrainStream:
    """The training stream of one data-parallel rank; the same on all tensor, pipeline and context ranks of a replica."""
    return ssa_pipelines.TrainStream(
        _sources(recipe),
        "train",
        phases=[ssa_pipelines.Phase(phase.from_tokens, phase.weights) for phase in recipe.data.phases],
        micro_batch_rows=recipe.train.micro_batch_rows,
        global_batch_rows=recipe.train.global_batch_rows,
        data_parallel_rank=rank,
        data_parallel_size=size,
        seed=recipe.train.seed,
        shuffle=recipe.data.shuffle,
        shuffle_block=recipe.data.shuffle_block,
        read_ahead=recipe.data.read_ahead,
        access=access(recipe),
    )


def evaluation_rows(recipe: Recipe, parallel: ParallelState) -> Iterator[ssa_pipelines.Rows]:
    """This rank's micro-batches of the first train.eval_rows validation rows."""
    per_rank = recipe.train.eval_rows // parallel.dp_size
    # The interleaved schedule wants a multiple of the stages; topology.py checked that rows one at a time give it.
    size = 1 if parallel.vpp_size > 1 else recipe.train.micro_batch_rows
    return ssa_pipelines.evaluation_rows(
        _sources(recipe),
        "validation",
        rows=recipe.train.eval_rows,
        micro_batch_rows=size if per_rank % size == 0 else 1,
        data_parallel_rank=parallel.dp_rank,
        data_parallel_size=parallel.dp_size,
        access=access(recipe),
    )


def ledger_of_step(run: Path, step: int) -> Iterator[dict]:
    """What step `step` of a run (numbered as in metrics.jsonl, from 1) saw; see ssa_pipelines.read_ledger."""
    from ssa_megatron.checkpoint.reader import Checkpoint
    from ssa_megatron.config import load_recipe

    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: not a run folder (config.yaml is missing)",
            remedy="name the folder of a run",
            id="ledger-not-a-run-folder",
        )
    recipe = load_recipe(str(run / "config.yaml"))
    rows, size = open_stream(recipe, 0, 1), recipe.train.global_batch_rows
    begin = (step - 1) * size
    if (run / "checkpoints").is_dir():
        content = Checkpoint.open(run).content
        state = rows.state_dict() if content.is_start else content.state["data"]
        if begin < state["origin"]["row"]:
            change = state["changes"][-1]
            raise ConfigError(
                f"step {step} came before the data changed at row {change['samples_seen']} ({change['reason']})",
                remedy="ask with the recipe of that time, in a copy of the run folder with a checkpoint of that time",
                id="step-before-data-change",
            )
        rows.load_state_dict(state)
    return ssa_pipelines.read_ledger(rows, begin, size)


def _sources(recipe: Recipe) -> str | dict[str, str]:
    found = recipe.data.sources or recipe.data.path
    if found is None:
        raise ConfigError(
            "data.path is not given",
            remedy="data.path=FOLDER, a folder written by `ssa data prepare`, or data.sources",
            id="no-dataset",
        )
    return found


def _check_evaluation(recipe: Recipe, infos: dict[str, ssa_pipelines.DatasetInfo]) -> None:
    """An evaluation that cannot be done is refused before training, not at its first interval."""
    have = sum(info.splits["validation"].rows if "validation" in info.splits else 0 for info in infos.values())
    if have < recipe.train.eval_rows:
        where = ", ".join(info.location for info in infos.values())
        raise ConfigError(
            f"train.eval_rows={recipe.train.eval_rows}, but the validation split of {where} has {have} rows",
            remedy=f"train.eval_rows={have}"
            if have
            else "train.eval_interval=0, or prepare with a validation fraction",
            id="eval-rows-exceed-split",
        )
