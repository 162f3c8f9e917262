"""Evaluation in the loop: held-out loss with either stream, alignment, and how much attention the selected blocks hold.

Runs the training model forward only, on the first `train.eval_rows` validation rows, in the same order every time. It changes
nothing that training depends on.
"""

import torch

from ssa_megatron.config import Recipe
from ssa_megatron.model.batch import SSABatch
from ssa_megatron.model.build import SSAModel
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.parallel.state import ParallelState
from ssa_megatron.train.data import evaluation_rows
from ssa_megatron.train.step import Drawn, forward_backward


@torch.no_grad()
def evaluate(model: SSAModel, recipe: Recipe, parallel: ParallelState) -> dict[str, float]:
    """`loss_full` and `loss_sparse` (kinds with two trunks) or `loss`, nats per token; `alignment`; `sparsity`, `entropy` (nats).

    Equal on every rank. Sparsity: full-attention mass inside the selected blocks, mean over tokens, heads and layers.
    """
    model.eval()
    kind = kind_of(recipe)
    rows = parallel.run_on_all(lambda: list(evaluation_rows(recipe, parallel)))
    results: dict[str, float] = {}
    for trunk in kind.trunks:
        first = not results
        batches = [SSABatch.pack(drawn.tokens, drawn.doc_starts, parallel, trunk=trunk) for drawn in rows]
        drawn = Drawn(batches, parallel.all_reduce_sum(sum(int(batch.counted.sum()) for batch in batches)))
        found = forward_backward(model, drawn, recipe, parallel, forward_only=True, wants_statistics=first)
        losses = found.losses()
        results[f"loss_{trunk}" if len(kind.trunks) > 1 else "loss"] = losses.cross_entropy
        if first:
            results["sparsity"], results["entropy"] = found.statistics()
            if kind.aligned:
                results["alignment"] = losses.alignment
    model.train()
    return results
