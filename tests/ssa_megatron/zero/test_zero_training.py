"""The command trains the same under every ZeRO stage: losses, norms and evaluations of a whole run, and its checkpoints."""

import pytest

from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.train.metrics import read_metrics
from tests.launch import run
from tests.ssa_megatron.support import recipe_file

FIGURES = ("loss", "alignment", "grad_norm", "eval/loss_full", "eval/loss_sparse", "eval/alignment", "eval/sparsity")
STAGES = {
    "ZeRO-1": (),
    "ZeRO-2": ("zero.stage=2",),
    "ZeRO-3, offloaded": ("zero.stage=3", "zero.offload_optimizer=true"),
}


@pytest.mark.slow
def test_a_run_of_two_ranks_with_evaluations_is_the_same_under_every_stage(tmp_path, dataset):
    overrides = {"train__steps": 4, "train__eval_interval": 2, "train__eval_rows": 4, "checkpoint__interval": 2}
    recipe = recipe_file(tmp_path, dataset, **overrides)
    found = {}
    for number, (stage, settings) in enumerate(STAGES.items()):
        folder = tmp_path / f"run-{number}"
        output = run(2, "ssa_megatron", "train", str(recipe), *settings, "--run-folder", str(folder), timeout=240)
        assert "28,576 parameters on this rank" in output, stage
        assert Checkpoint.open(folder).content.state["applied_steps"] == 4
        lines = read_metrics(folder / "metrics.jsonl")
        found[stage] = [[line[name] for name in FIGURES if name in line] for line in lines]
        assert [len(figures) for figures in found[stage]] == [3, 7, 3, 7]
    for stage in STAGES:
        for mine, reference in zip(found[stage], found["ZeRO-1"], strict=True):
            assert mine == pytest.approx(reference, rel=1e-5), stage
