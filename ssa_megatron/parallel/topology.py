"""The one table of what may be combined: parallel sizes, ZeRO stage, optimizer, heads, batch.

`check` is called before any process group exists, by `train` and by everything that plans; each row of RULES names the fields,
the reason and what would work instead. A combination that passes here has been shown equal to one process by the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ssa_megatron.config import Recipe
from ssa_megatron.config.variants import OPTIMIZERS
from ssa_megatron.errors import ConfigError


@dataclass(frozen=True)
class Rule:
    """`broken(recipe, world)` is whether a run of `world` processes breaks the rule; its ConfigError carries `id`."""

    id: str
    fields: str
    broken: Callable[[Recipe, int], bool]
    reason: str
    remedy: str


def model_ranks(recipe: Recipe) -> int:
    """Processes that hold one copy of the model."""
    p = recipe.parallel
    return p.tensor * p.pipeline * p.context


def data_parallel_size(recipe: Recipe, world: int) -> int:
    """Copies of the model; only meaningful once `check` has passed."""
    return world // model_ranks(recipe)


def micro_batches(recipe: Recipe, world: int) -> int:
    """Micro-batches each data-parallel rank runs per optimizer step (gradient accumulation)."""
    return recipe.train.global_batch_rows // (recipe.train.micro_batch_rows * data_parallel_size(recipe, world))


RULES = (
    Rule(
        "zero-stage-with-pipeline",
        "zero.stage",
        lambda r, w: r.zero.stage > 1 and r.parallel.pipeline > 1,
        "ZeRO-2 and 3 partition gradients during every backward, which a pipeline's schedule interleaves",
        "zero.stage=1, or parallel.pipeline=1 (with parallel.tensor=2 if the model does not fit)",
    ),
    Rule(
        "offload-under-zero-1",
        "zero.offload_optimizer",
        lambda r, w: r.zero.offload_optimizer and r.zero.stage == 1,
        "under ZeRO-1 bf16 gradients accumulate in DeepSpeed's BF16_Optimizer, which keeps masters and moments on the device",
        "zero.stage=2, or zero.offload_optimizer=false",
    ),
    Rule(
        "pipeline-divides-layers",
        "parallel.pipeline",
        lambda r, w: r.model.num_layers % (r.parallel.pipeline * r.parallel.virtual_pipeline) != 0,
        "parallel.pipeline * parallel.virtual_pipeline must divide model.num_layers, so that stages are equal",
        "parallel.virtual_pipeline=1, or a parallel.pipeline that divides model.num_layers",
    ),
    Rule(
        "interleaving-without-pipeline",
        "parallel.virtual_pipeline",
        lambda r, w: r.parallel.virtual_pipeline > 1 and r.parallel.pipeline == 1,
        "an interleaved schedule needs pipeline stages to interleave",
        "parallel.virtual_pipeline=1, or parallel.pipeline=2",
    ),
    Rule(
        "interleaving-micro-batches",
        "parallel.virtual_pipeline",
        lambda r, w: (
            r.parallel.virtual_pipeline > 1 and w >= model_ranks(r) and micro_batches(r, w) % r.parallel.pipeline != 0
        ),
        "the interleaved schedule needs the number of micro-batches per data-parallel rank to be a multiple of "
        "parallel.pipeline",
        "parallel.virtual_pipeline=1, or a train.global_batch_rows that gives such a number",
    ),
    Rule(
        "context-divides-row",
        "parallel.context",
        lambda r, w: r.parallel.context > 1 and r.train.sequence_length % (2 * r.parallel.context) != 0,
        "context parallelism cuts each row into 2 * parallel.context equal chunks",
        "a train.sequence_length that 2 * parallel.context divides, or parallel.context=1",
    ),
    Rule(
        "sequence-without-tensor",
        "parallel.sequence",
        lambda r, w: r.parallel.sequence and r.parallel.tensor == 1,
        "sequence parallelism divides activations over tensor-parallel ranks, and there is one",
        "parallel.sequence=false, or parallel.tensor=2",
    ),
    Rule(
        "sequence-divides-row",
        "parallel.sequence",
        lambda r, w: r.parallel.sequence and r.train.sequence_length % (r.parallel.tensor * r.parallel.context) != 0,
        "sequence parallelism needs train.sequence_length to be a multiple of parallel.tensor * parallel.context",
        "a train.sequence_length that they divide, or parallel.sequence=false",
    ),
    Rule(
        "tensor-divides-heads",
        "parallel.tensor",
        lambda r, w: r.model.num_heads % r.parallel.tensor != 0,
        "parallel.tensor must divide model.num_heads",
        "parallel.tensor=1, or a number that divides model.num_heads",
    ),
    Rule(
        "tensor-and-kv-heads",
        "parallel.tensor",
        lambda r, w: r.model.num_kv_heads % r.parallel.tensor != 0 and r.parallel.tensor % r.model.num_kv_heads != 0,
        "either parallel.tensor divides model.num_kv_heads, or model.num_kv_heads divides parallel.tensor (each key/value head "
        "then lives on several ranks)",
        "parallel.tensor=1, or parallel.tensor=model.num_kv_heads",
    ),
    Rule(
        "tensor-divides-ffn",
        "parallel.tensor",
        lambda r, w: r.model.ffn_size % r.parallel.tensor != 0,
        "parallel.tensor must divide model.ffn_size",
        "parallel.tensor=1, or a model.ffn_size that it divides",
    ),
    Rule(
        "world-size",
        "world size",
        lambda r, w: w % model_ranks(r) != 0,
        "the number of processes must be a multiple of parallel.tensor * parallel.pipeline * parallel.context",
        "start a multiple of that many processes, or lower one of the three",
    ),
    Rule(
        "global-batch-divides",
        "train.global_batch_rows",
        lambda r, w: r.train.global_batch_rows % (r.train.micro_batch_rows * max(1, w // model_ranks(r))) != 0,
        "train.global_batch_rows must be a multiple of train.micro_batch_rows times the data-parallel size",
        "a multiple of it, or a smaller train.micro_batch_rows",
    ),
    Rule(
        "eval-rows-divide",
        "train.eval_rows",
        lambda r, w: r.train.eval_interval > 0 and r.train.eval_rows % max(1, w // model_ranks(r)) != 0,
        "train.eval_rows must be a multiple of the data-parallel size, so that every rank evaluates equally many rows",
        "a multiple of it",
    ),
    Rule(
        "interleaving-eval-rows",
        "train.eval_rows",
        lambda r, w: (
            r.train.eval_interval > 0
            and r.parallel.virtual_pipeline > 1
            and r.train.eval_rows % (max(1, w // model_ranks(r)) * r.parallel.pipeline) != 0
        ),
        "the interleaved schedule needs train.eval_rows to be a multiple of the data-parallel size times parallel.pipeline",
        "a multiple of it, or parallel.virtual_pipeline=1",
    ),
    Rule(
        "optimizer-needs-whole-matrices",
        "optimizer.kind",
        lambda r, w: OPTIMIZERS[r.optimizer.kind].whole_matrices,
        "ZeRO passes flat ranges of parameters to the optimizer, and this one needs whole matrices",
        "optimizer.kind=adamw",
    ),
)


def first_broken(recipe: Recipe, world: int) -> Rule | None:
    """The first rule that `world` processes would break with `recipe`; None when the combination is legal."""
    return next((rule for rule in RULES if rule.broken(recipe, world)), None)


def refusal(rule: Rule, recipe: Recipe, world: int, *, remedy: str) -> ConfigError:
    """The error that names field, values, reason and remedy of a broken rule."""
    p, m, train = recipe.parallel, recipe.model, recipe.train
    return ConfigError(
        f"{rule.fields} is not possible for {world} process(es) with tensor={p.tensor} sequence={p.sequence} "
        f"pipeline={p.pipeline} virtual_pipeline={p.virtual_pipeline} context={p.context} zero.stage={recipe.zero.stage}, "
        f"num_layers={m.num_layers}, num_heads={m.num_heads}, num_kv_heads={m.num_kv_heads}, "
        f"sequence_length={train.sequence_length}, global_batch_rows={train.global_batch_rows}, "
        f"micro_batch_rows={train.micro_batch_rows}: {rule.reason}",
        remedy=remedy,
        id=rule.id,
    )


def check(recipe: Recipe, world: int) -> None:
    """Raise ConfigError naming field, value, reason and remedy if `world` processes cannot run `recipe`."""
    if rule := first_broken(recipe, world):
        remedy = f"{rule.remedy}; `ssa plan` with --world {world} names the nearest legal ways"
        raise refusal(rule, recipe, world, remedy=remedy)
