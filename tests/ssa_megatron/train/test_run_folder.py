"""The run folder: one owner, who is named; a dead owner's lock is free; one recipe, whose changes are named."""

import json
import os
import select
import signal
import subprocess
import sys

import pytest

from ssa_megatron.config import dump_recipe, load_recipe
from ssa_megatron.errors import RunFolderError
from ssa_megatron.train.run_folder import RunFolder, claim, read_recipe
from ssa_megatron.zero.ds_config import deepspeed_config
from tests.errors import raises
from tests.launch import environment, kill
from tests.ssa_megatron.support import tiny

HOLD = """
import sys, time
from pathlib import Path
from ssa_megatron.train.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.lock()
print("locked", flush=True)
time.sleep(100)
"""


@pytest.fixture
def owner(tmp_path):
    """Another process that holds the lock of tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        ready, _, _ = select.select([process.stdout], [], [], 60)  # readline has no time limit of its own
        assert ready, "the other process did not take the lock within 60 s"
        assert process.stdout.readline() == "locked\n"
        yield process
    finally:
        kill(process)
        process.stdout.close()


@pytest.fixture
def tokenizer_files():
    return {"tokenizer.model": b"a tokenizer"}


def take(run, recipe, tokenizer_files, parallel) -> RunFolder:
    folder = claim(run, recipe, parallel)
    folder.record(recipe, tokenizer_files, deepspeed_config(recipe), parallel)
    return folder


# -------------------------------------------------------------------------------------------------------- ownership
def test_a_second_owner_is_refused_with_the_firsts_pid_until_that_is_killed(owner, tmp_path):
    with raises(RunFolderError, "run-folder-in-use", tmp_path / "run", owner.pid, "--run-folder") as refused:
        RunFolder(tmp_path / "run").lock()
    assert refused.value.exit_code == 5
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait(timeout=10)
    folder = RunFolder(tmp_path / "run")
    folder.lock()
    assert (tmp_path / "run" / "owner.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_refused_claim_changes_nothing_in_the_folder(owner, tmp_path, tokenizer_files, alone):
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    with raises(RunFolderError, "run-folder-in-use", owner.pid):
        take(tmp_path / "run", tiny(), tokenizer_files, alone)
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before


# --------------------------------------------------------------------------------------------------------- contents
def test_a_claimed_folder_holds_recipe_environment_deepspeed_config_and_tokenizer(tmp_path, tokenizer_files, alone):
    run, recipe = tmp_path / "runs" / "new", tiny()
    folder = take(run, recipe, tokenizer_files, alone)
    names = ["config.yaml", "ds_config.json", "environment.json", "owner.lock", "tokenizer.model"]
    assert sorted(path.name for path in run.iterdir()) == names
    assert (run / "config.yaml").read_text() == dump_recipe(recipe)
    assert load_recipe(str(run / "config.yaml")) == read_recipe(run) == recipe
    assert json.loads((run / "ds_config.json").read_text()) == deepspeed_config(recipe)
    assert (folder.path / "tokenizer.model").read_bytes() == b"a tokenizer"
    environment_found = json.loads((run / "environment.json").read_text())
    assert environment_found["packages"]["torch"]
    assert environment_found["world"] == 1


def test_the_same_recipe_may_continue_with_another_topology_and_keeps_its_tokenizer(tmp_path, tokenizer_files, alone):
    take(tmp_path / "run", tiny(), tokenizer_files, alone)
    tokenizer_files["tokenizer.model"] = b"another"
    changed = tiny(train__recompute="full", checkpoint__interval=3, zero__reduce_bucket_mb=5)
    take(tmp_path / "run", changed, tokenizer_files, alone)
    assert read_recipe(tmp_path / "run") == changed
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == b"a tokenizer"


def test_another_recipe_is_refused_with_the_fields_that_differ(tmp_path, tokenizer_files, alone):
    take(tmp_path / "run", tiny(), tokenizer_files, alone)
    kept = (tmp_path / "run" / "config.yaml").read_text()
    changes = ("model.hidden_size: 32 -> 40", "train.seed: 1234 -> 9")
    with raises(RunFolderError, "run-of-another-recipe", *changes, "--run-folder") as refused:
        take(tmp_path / "run", tiny(model__hidden_size=40, train__seed=9), tokenizer_files, alone)
    assert "vocab_size" not in refused.value.problem
    assert (tmp_path / "run" / "config.yaml").read_text() == kept


def test_a_folder_that_is_no_run_is_refused_by_name(tmp_path):
    with raises(RunFolderError, "config-yaml-unreadable", tmp_path, "config.yaml"):
        read_recipe(tmp_path)


def test_a_run_folder_whose_config_was_edited_into_nonsense_says_which_field(tmp_path):
    (tmp_path / "config.yaml").write_text(dump_recipe(tiny()).replace("hidden_size: 32", "hidden_size: wide"))
    with raises(RunFolderError, "config-yaml-damaged", "config.yaml", "model.hidden_size"):
        read_recipe(tmp_path)
