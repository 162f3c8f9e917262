"""An optimizer from outside the package trains, is saved, continues bit for bit, and is planned by the state it names."""

import json
import subprocess
import sys

import pytest
import torch

from ssa_megatron.checkpoint.reader import Checkpoint, load_into
from ssa_megatron.checkpoint.writer import save_checkpoint
from ssa_megatron.config import digest
from ssa_megatron.config.variants import OPTIMIZERS
from ssa_megatron.errors import CheckpointError, ConfigError
from ssa_megatron.optim import optimizer_of
from ssa_megatron.parallel import topology
from ssa_megatron.planning.memory import memory
from ssa_megatron.planning.plan_page import checkpoint_bytes
from tests.errors import raises
from tests.launch import environment
from tests.ssa_megatron.support import build, gradients_at_step, take_steps, tiny
from tests.ssa_megatron.toys import Momentum, registered


@pytest.fixture(autouse=True)
def toys():
    with registered():
        yield


def state_of(optimizer) -> list[torch.Tensor]:
    return [t.clone() for f in optimizer.fragments() for t in (f.working, *f.stored.values())]


def save(folder, optimizer, recipe, parallel, step: int) -> Checkpoint:
    about = {"state": {"applied_steps": step}, "tokenizer_fingerprint": "f" * 64}
    assert save_checkpoint(folder, optimizer, recipe, parallel, step=step, **about) is None
    return Checkpoint.open(folder)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_a_new_optimizer_trains_is_saved_and_continues_bit_for_bit(alone, tmp_path, stage, precision):
    recipe = tiny(optimizer__kind="momentum", zero__stage=stage, train__precision=precision)
    model, optimizer = build(recipe, alone)
    take_steps(model, optimizer, recipe, alone, 0, 1)
    checkpoint = save(tmp_path, optimizer, recipe, alone, 1)
    expected = take_steps(model, optimizer, recipe, alone, 1, 3)

    model, again = build(recipe, alone)
    load_into(checkpoint, again, applied_steps=1)
    assert take_steps(model, again, recipe, alone, 1, 3) == expected
    assert all(torch.equal(a, b) for a, b in zip(state_of(optimizer), state_of(again), strict=True))


def test_its_update_is_its_own_formula(alone):
    recipe = tiny(optimizer__kind="momentum", optimizer__clip_grad_norm=0, optimizer__weight_decay=0)
    model, optimizer = build(recipe, alone)
    before = [fragment.master.clone() for fragment in optimizer.fragments()]
    with gradients_at_step(optimizer) as found:
        take_steps(model, optimizer, recipe, alone, 0, 1)
    for (fragment, gradient), master in zip(found, before, strict=True):
        assert torch.equal(fragment.state["momentum_buffer"], gradient)
        assert torch.equal(fragment.master, master.add(gradient, alpha=-1e-3))


def test_a_checkpoint_names_the_state_as_the_optimizer_does(alone, tmp_path):
    recipe = tiny(optimizer__kind="momentum")
    optimizer = build(recipe, alone)[1]
    checkpoint = save(tmp_path, optimizer, recipe, alone, 1)
    assert {frozenset(kinds) for kinds in checkpoint.content.tensors.values()} == {
        frozenset({"master", "momentum_buffer"})
    }
    assert checkpoint.digest() == checkpoint.digest(("master", "momentum_buffer")) != checkpoint.digest(("master",))


def test_a_checkpoint_of_another_optimizer_is_refused_by_the_state_it_lacks(alone, tmp_path):
    recipe = tiny(optimizer__kind="momentum")
    checkpoint = save(tmp_path, build(recipe, alone)[1], recipe, alone, 1)
    with raises(CheckpointError, "no-such-state", "exp_avg"):
        load_into(checkpoint, build(tiny(), alone)[1], applied_steps=1)


@pytest.mark.parametrize("offload", [False, True])
def test_the_plans_bytes_follow_the_state_list(offload):
    zero = {"zero__stage": 2, "zero__offload_optimizer": offload}
    adamw, toy = (memory(tiny(optimizer__kind=kind, **zero), 2)[0] for kind in ("adamw", "momentum"))
    if offload:
        assert adamw.host * 2 == toy.host * 3
    else:
        assert adamw.states["moments (fp32)"] == 2 * toy.states["moments (fp32)"] == 2 * toy.states["masters (fp32)"]
    parameters = checkpoint_bytes(tiny()) // 12
    assert checkpoint_bytes(tiny(optimizer__kind="momentum")) == 8 * parameters
    assert checkpoint_bytes(tiny(train__precision="bf16")) == 14 * parameters


def test_another_optimizer_is_another_run():
    assert digest(tiny(optimizer__kind="momentum")) != digest(tiny())


def test_an_unknown_optimizer_is_refused_where_the_recipe_is_read():
    with raises(ConfigError, "unknown-variant-name", "optimizer.kind", "adamw", "'shampoo'"):
        tiny(optimizer__kind="shampoo")


def test_an_unknown_optimizer_raises_where_it_is_first_asked_for():
    recipe = tiny(optimizer__kind="momentum")
    OPTIMIZERS.unregister("momentum")
    for ask in (optimizer_of, lambda r: topology.check(r, 1), checkpoint_bytes, lambda r: memory(r, 1)):
        with raises(ConfigError, "unknown-variant", "optimizer.kind=momentum"):
            ask(recipe)


def test_a_state_name_that_checkpoints_use_for_weights_is_refused():
    with pytest.raises(TypeError, match="master"):
        type("Wrong", (Momentum,), {"state": ("master",)})


def test_the_planner_asks_an_optimizer_without_torch():
    code = (
        "import json, sys; from ssa_megatron.optim import optimizer_of; from ssa_megatron.config import load_recipe;"
        "print(json.dumps([optimizer_of(load_recipe('demo')).bytes_per_parameter, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [8, False]
