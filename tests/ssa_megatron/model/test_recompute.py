"""Recomputation really happens, where the recipe says, and leaves loss, gradients and the alignment's count as they were."""

import pytest
import torch

from ssa_megatron.model.build import build_model
from ssa_megatron.train.step import Drawn, draw_batches, forward_backward
from tests.ssa_megatron.support import own_rows, tiny


def measure(parallel, recompute: str):
    """(passes through the attention core and through the MLP per layer and micro-batch, loss, alignment entries, gradients)."""
    recipe = tiny(train__recompute=recompute, train__micro_batch_rows=2)
    model = build_model(recipe, parallel)
    model.train()
    passes = {"core": 0, "mlp": 0}

    def count(name):
        def hook(*_):
            passes[name] += 1

        return hook

    for layer in model.chunks[0].decoder.layers:
        layer.self_attention.core_attention.register_forward_pre_hook(count("core"))
        layer.mlp.register_forward_pre_hook(count("mlp"))
    batches = draw_batches(own_rows(recipe, parallel, 0), recipe, parallel, step=0)
    done = forward_backward(model, Drawn(batches, 100.0), recipe, parallel)
    layers = recipe.model.num_layers * len(batches)
    alignment = [torch.stack(collector.alignment).sort().values for collector in done.collectors]
    return (
        passes["core"] / layers,
        passes["mlp"] / layers,
        done.cross_entropy,
        alignment,
        [p.grad for p in model.parameters()],
    )


@pytest.mark.parametrize(("recompute", "core", "mlp"), [("none", 1, 1), ("selective", 2, 1), ("full", 2, 2)])
def test_what_the_recipe_names_is_computed_twice_and_changes_nothing(alone, recompute, core, mlp):
    found = measure(alone, recompute)
    assert found[:2] == (core, mlp)
    _, _, loss, alignment, gradients = measure(alone, "none")
    assert torch.equal(found[2], loss)
    for mine, reference in zip(found[3], alignment, strict=True):
        assert len(mine) == tiny().model.num_layers, "one alignment loss a layer, also where the layer ran twice"
        assert torch.equal(mine, reference)
    for mine, reference in zip(found[4], gradients, strict=True):
        assert torch.equal(mine, reference)
