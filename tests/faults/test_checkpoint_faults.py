"""What happens to a checkpoint that is written while training goes on: a slow disk, a full one, a kill in the middle."""

import json
import os
import time

import pytest

from ssa_megatron.checkpoint.manifest import committed
from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.train.metrics import read_metrics
from tests import launch
from tests.ssa_megatron.conftest import corpus, dataset, tokenizer  # noqa: F401 (fixtures)
from tests.ssa_megatron.support import recipe_file
from tests.workers.checkpoint_while_training import STAGES


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("while-training")
    launch.run(2, "tests.workers.checkpoint_while_training", str(folder), timeout=200)
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("stage", map(str, STAGES))
def test_what_a_slow_disk_gets_during_the_next_step_is_what_a_save_at_once_writes(found, stage):
    for seen in found[stage]["slow"]:
        assert seen["was still writing after backward"] == [True]
        assert seen["said"] == [None]
        assert seen["applied"]
        assert seen["waited"] > 0.0
        assert seen["digests"][0] == seen["digests"][1]


@pytest.mark.parametrize("stage", map(str, STAGES))
def test_a_disk_full_for_one_rank_is_told_on_all_before_the_next_update_and_training_goes_on(found, stage):
    for seen in found[stage]["full"]:
        [said] = seen["said"]
        assert said.startswith("not written: rank 1: [Errno 27] File too large")
        assert seen["applied"]
        assert seen["entries"] == ["latest", "step-00000002", "step-00000003"], "older ones intact, nothing left behind"
        assert seen["then"][0] == "step-00000005", "once there is room again, saving works"


def test_a_kill_in_the_middle_of_a_background_write_resumes_from_the_checkpoint_before(tmp_path, dataset):  # noqa: F811
    recipe = recipe_file(tmp_path, dataset, train__steps=6, checkpoint__interval=2)
    run = tmp_path / "run"
    arguments = ["train", str(recipe), "--run-folder", str(run)]
    process = launch.start(2, "tests.workers.slow_disk", "4", *arguments)
    half = [run / "checkpoints" / ".tmp-step-00000004" / f"rank-{rank:05d}-000.safetensors" for rank in (0, 1)]
    deadline = time.monotonic() + 240
    try:
        while not all(path.exists() for path in half):
            assert process.poll() is None, process.stdout.read()[-4000:]
            assert time.monotonic() < deadline, "no write of step 4 within 240 s"
            time.sleep(0.05)
    finally:
        launch.kill(process)
    assert read_metrics(run / "metrics.jsonl")[-1]["step"] == 4
    assert [path.name for path in committed(run)] == ["step-00000002"]
    output = launch.run(2, "ssa_megatron", *arguments, timeout=240)
    assert "restored step-00000002" in output
    assert Checkpoint.open(run).content.step == 6
    assert not [name for name in os.listdir(run / "checkpoints") if name.startswith(".tmp")]
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
