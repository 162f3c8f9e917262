"""Evaluation in the loop: held-out loss with either stream, alignment, and how much attention the selected blocks hold.

Runs the training model forward only, on the first `train.eval_rows` validation rows, in the same order every time. It changes
nothing that training depends on.
"""

import torch
import torch.distributed as dist

from pipelines import evaluation_rows
from ssa_megatron.config import Recipe
from ssa_megatron.model.batch import SSABatch
from ssa_megatron.model.build import SSAModel
from ssa_megatron.parallel.context import ParallelContext


@torch.no_grad()
def evaluate(model: SSAModel, recipe: Recipe, context: ParallelContext) -> dict[str, float]:
    """`loss_full` and `loss_sparse` (ssa) or `loss` (others), nats per token; `alignment`; `sparsity` and `entropy` (nats).

    Equal on every rank. Sparsity: full-attention mass inside the selected blocks, mean over tokens, heads and layers.
    """
    model.eval()
    trunks = {"loss_full": "full", "loss_sparse": "sparse"} if recipe.attention.kind == "ssa" else {"loss": "full"}
    rows = context.together(lambda: list(_rows(recipe, context)))
    results = {}
    for position, (name, trunk) in enumerate(trunks.items()):
        totals = torch.zeros(5, dtype=torch.float64, device=context.device)  # ce, tokens, alignment, sparsity, entropy
        batches = 0
        for drawn in rows:
            batch = SSABatch.pack(
                recipe, drawn.tokens, drawn.doc_starts, trunk=trunk, alignment_scale=0.0, device=context.device
            )
            batch.wants_statistics = position == 0
            losses = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch)
            totals[0] += (losses.double() * batch.counted).sum()
            totals[1] += batch.counted.sum()
            if batch.alignment:
                totals[2] += torch.stack(batch.alignment).double().mean()
            if batch.statistics:
                totals[3:] += torch.stack(batch.statistics).double().mean(0)
            batches += 1
        totals[2:] /= batches * context.data_size * context.tensor_size
        dist.all_reduce(totals[2:], group=context.tensor_group)
        dist.all_reduce(totals, group=context.data_group)
        ce, tokens, alignment, sparsity, entropy = totals.tolist()
        results[name] = ce / tokens
        if position == 0:
            results["sparsity"], results["entropy"] = sparsity, entropy
            if recipe.attention.kind == "ssa":
                results["alignment"] = alignment
    model.train()
    return results


def _rows(recipe: Recipe, context: ParallelContext):
    per_rank = recipe.train.eval_rows // context.data_size
    size = recipe.train.micro_batch_rows
    return evaluation_rows(
        recipe.data.path,
        "validation",
        rows=recipe.train.eval_rows,
        micro_batch_rows=size if per_rank % size == 0 else 1,
        data_parallel_rank=context.data_rank,
        data_parallel_size=context.data_size,
    )
