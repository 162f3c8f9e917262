"""A run's account of its starts: deaths are counted, words are not, progress begins the count anew, and the batch is named."""

import json
from pathlib import Path

import pytest

from ssa_megatron.errors import TrainingStopped
from ssa_megatron.train import restarts
from ssa_megatron.train.restarts import Attempt, check, read_starts
from tests import launch
from tests.errors import raises
from tests.ssa_megatron.support import recipe_file


def finish_step(run: Path, step: int) -> None:
    """What metrics.jsonl is after a start that came as far as `step`."""
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": s}) + "\n" for s in range(1, step + 1)))


def die(run: Path, *, start: int, reached: int) -> None:
    Attempt(run, step=start, world=2)
    finish_step(run, reached)


def test_three_restarts_without_progress_stop_the_run_and_name_the_batch(tmp_path):
    for deaths in range(4):
        check(tmp_path, global_batch_rows=8)
        die(tmp_path, start=10, reached=16)
        assert len(read_starts(tmp_path)) == deaths + 1
    with raises(
        TrainingStopped, "crash-loop", "4 starts", "step 17", "128..135", f"ssa data ledger {tmp_path} 17"
    ) as stopped:
        check(tmp_path, global_batch_rows=8)
    assert stopped.value.exit_code == 6
    (tmp_path / "starts.jsonl").unlink()  # the remedy
    check(tmp_path, global_batch_rows=8)


def test_deaths_in_different_steps_are_all_named(tmp_path):
    for reached in (16, 12, 16, 9):  # 9: killed while restoring, metrics.jsonl as it was before the checkpoint's step
        die(tmp_path, start=10, reached=reached)
    with raises(TrainingStopped, "crash-loop", "step 11", "step 13", "step 17"):
        check(tmp_path, global_batch_rows=8)


@pytest.mark.parametrize("progress", ["a newer checkpoint", "a word"])
def test_progress_begins_the_count_anew(tmp_path, progress):
    for _ in range(3):
        die(tmp_path, start=10, reached=16)
    if progress == "a word":
        attempt = Attempt(tmp_path, step=10, world=2)
        attempt.end("stopped by a signal")
        die(tmp_path, start=10, reached=16)
    else:
        die(tmp_path, start=20, reached=26)
    check(tmp_path, global_batch_rows=8)


def test_a_torn_line_is_left_out_and_the_next_one_is_whole(tmp_path):
    die(tmp_path, start=0, reached=1)
    with (tmp_path / "starts.jsonl").open("a") as file:
        file.write('{"event": "st')
    die(tmp_path, start=1, reached=2)
    assert [(start.step, start.reached) for start in read_starts(tmp_path)] == [(0, 1), (1, 2)]


def test_the_command_refuses_before_it_loads_anything(tmp_path):
    for _ in range(restarts.RESTARTS + 1):
        die(tmp_path, start=3, reached=3)
    refused = launch.run(
        1, "ssa_megatron", "train", str(recipe_file(tmp_path, None)), "--run-folder", str(tmp_path), expect=6
    )
    assert "the batch of step 4 (rows 12..15 of the stream)" in refused
    assert "remedy: " in refused
    assert "loading libraries" not in refused
