"""Checkpoints on CUDA: what side streams copy during the next step is the state before it, on the device and offloaded."""

import pytest
import torch

from ssa_megatron.checkpoint.reader import Checkpoint, load_into
from ssa_megatron.checkpoint.writer import PendingCheckpoint, save_checkpoint
from tests.ssa_megatron.conftest import alone  # noqa: F401 (fixture)
from tests.ssa_megatron.support import build, own_rows, take_steps, tiny, train_step

pytestmark = pytest.mark.gpu
UNTOUCHED = ("weight", "master", "exp_avg_sq")
ZERO = {
    "ZeRO-1": {},
    "ZeRO-2": {"zero__stage": 2},
    "ZeRO-2, offloaded": {"zero__stage": 2, "zero__offload_optimizer": True},
    "ZeRO-3": {"zero__stage": 3},
}


@pytest.mark.parametrize("zero", ZERO)
def test_a_background_save_equals_one_at_once_and_loads(alone, tmp_path, zero):  # noqa: F811
    size = {
        "model__vocab_size": 30_000,
        "model__hidden_size": 256,
        "train__precision": "bf16",
    }  # several chunks a tensor
    recipe = tiny(**size, **ZERO[zero], attention__backend="torch")
    model, optimizer = build(recipe, alone)
    take_steps(model, optimizer, recipe, alone, 0, 2)
    about = {"state": {"step": 2}, "tokenizer_fingerprint": "t"}
    assert save_checkpoint(tmp_path, optimizer, recipe, alone, step=2, **about) is None
    said = []
    torch.cuda._sleep(200_000_000)  # the device is behind the host: a copy that does not wait for it reads too early
    for fragment in optimizer.fragments():
        fragment.state["exp_avg"].mul_(2.0)
    pending = PendingCheckpoint(tmp_path, optimizer, recipe, alone, step=3, **about)
    result = train_step(
        model,
        optimizer,
        own_rows(recipe, alone, 2),
        recipe,
        alone,
        step=2,
        lr=1e-3,
        before_update=lambda: said.append(pending.finish()),
    )
    assert said == [None]
    assert result.applied
    at_once, meanwhile = (Checkpoint.open(tmp_path, step=step) for step in (2, 3))
    assert meanwhile.digest(UNTOUCHED) == at_once.digest(UNTOUCHED)
    for name in at_once.names():
        assert torch.equal(meanwhile.tensor(name, "exp_avg"), 2.0 * at_once.tensor(name, "exp_avg"))
    load_into(meanwhile, optimizer, applied_steps=2)
    assert save_checkpoint(tmp_path, optimizer, recipe, alone, step=4, **about) is None
    kinds = (*UNTOUCHED, "exp_avg")
    assert Checkpoint.open(tmp_path, step=4).digest(kinds) == meanwhile.digest(kinds)
