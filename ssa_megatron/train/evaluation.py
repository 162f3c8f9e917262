"""Evaluation in the loop: held-out loss with either stream, alignment, and how much attention the selected blocks hold.

Runs the training model forward only, on the first `train.eval_rows` validation rows, in the same order every time. It changes
nothing that training depends on.
"""

import torch
import torch.distributed as dist

from ssa_megatron.config import Recipe
from ssa_megatron.model.batch import SSABatch
from ssa_megatron.model.build import SSAModel
from ssa_megatron.parallel.state import ParallelState
from ssa_megatron.train.data import evaluation_rows
from ssa_megatron.train.step import forward_backward, reduce_losses


@torch.no_grad()
def evaluate(model: SSAModel, recipe: Recipe, parallel: ParallelState) -> dict[str, float]:
    """`loss_full` and `loss_sparse` (ssa) or `loss` (others), nats per token; `alignment`; `sparsity` and `entropy` (nats).

    Equal on every rank. Sparsity: full-attention mass inside the selected blocks, mean over tokens, heads and layers.
    """
    model.eval()
    trunks = {"loss_full": "full", "loss_sparse": "sparse"} if recipe.attention.kind == "ssa" else {"loss": "full"}
    rows = parallel.run_on_all(lambda: list(evaluation_rows(recipe, parallel)))
    results = {}
    for position, (name, trunk) in enumerate(trunks.items()):
        batches = [
            SSABatch.pack(recipe, drawn.tokens, drawn.doc_starts, parallel, trunk=trunk, alignment_scale=0.0)
            for drawn in rows
        ]
        for batch in batches:
            batch.wants_statistics = position == 0
        counted = parallel.all_reduce_sum(sum(int(batch.counted.sum()) for batch in batches))
        ce = forward_backward(model, batches, recipe, parallel, counted=counted, forward_only=True)
        results[name], alignment, _ = reduce_losses(ce, batches, recipe, parallel, counted=counted)
        if position == 0:
            results["sparsity"], results["entropy"] = _statistics(batches, recipe, parallel)
            if recipe.attention.kind == "ssa":
                results["alignment"] = alignment
    model.train()
    return results


def _statistics(batches: list[SSABatch], recipe: Recipe, parallel: ParallelState) -> list[float]:
    """Sparsity and entropy, means over tokens, heads and layers; every rank measured its own."""
    total = torch.stack([one for batch in batches for one in batch.statistics]).double().sum(0)
    total /= recipe.model.num_layers * len(batches) * parallel.dp_cp_size * parallel.tp_size
    dist.all_reduce(total)
    return total.tolist()
