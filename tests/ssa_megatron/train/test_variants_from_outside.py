"""An optimizer, a schedule and a logger that only this test knows: a run with them trains, continues and is planned."""

import os
from pathlib import Path

import pytest

from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.config import load_recipe
from ssa_megatron.planning import hardware, search
from ssa_megatron.train.hooks import Hook
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.signals import StopRequest
from ssa_megatron.train.trainer import Trainer
from tests.ssa_megatron.support import recipe_file
from tests.ssa_megatron.toys import registered


class StopAfter(Hook):
    """Asks for the end of the run after step `last`."""

    def __init__(self, stop: StopRequest, last: int):
        self.stop, self.last = stop, last

    def after_step(self, step, values):
        if step == self.last:
            self.stop.ask("a test")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    before = dict(os.environ)
    with registered():
        yield
    for name in os.environ.keys() - before.keys():  # the launcher's variables
        del os.environ[name]


def train(recipe, folder: Path, *, last: int = 0) -> int:
    """One start of the run in this process; stops after step `last`. Returns the exit code."""
    stop = StopRequest()
    trainer = Trainer(recipe, folder, stop=stop, hooks=[StopAfter(stop, last)])
    code = trainer.run()
    trainer.folder._lock.close()  # a run owns its folder until its process ends
    return code


def test_a_run_with_them_trains_continues_bit_for_bit_and_is_planned(dataset, tmp_path):
    fields = {"optimizer__kind": "momentum", "schedule__kind": "halving", "logging__loggers": {"recorder": "lines.txt"}}
    recipe = load_recipe(str(recipe_file(tmp_path, dataset, **fields, schedule__warmup_fraction=0.0)))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(recipe, whole) == 0
    assert [train(recipe, parts, last=1), train(recipe, parts)] == [75, 0]

    assert Checkpoint.open(parts).digest() == Checkpoint.open(whole).digest()
    lines = read_metrics(parts / "metrics.jsonl")
    assert [(line["step"], line["lr"]) for line in lines] == [(1, 1e-3), (2, 5e-4), (3, 2.5e-4)]
    assert [line["loss"] for line in lines] == [line["loss"] for line in read_metrics(whole / "metrics.jsonl")]
    steps = [f"step {line['step']} loss {line['loss'].hex()} lr {line['lr'].hex()}" for line in lines]
    assert (whole / "lines.txt").read_text().splitlines() == ["start after 0", *steps, "closed"]
    starts = ["start after 0", steps[0], "closed", "start after 1", *steps[1:], "closed"]
    assert (parts / "lines.txt").read_text().splitlines() == starts

    plan = search.evaluate(recipe, 1, hardware.find("h100"))
    assert plan.stages[0].states["moments (fp32)"] == plan.stages[0].states["masters (fp32)"]
