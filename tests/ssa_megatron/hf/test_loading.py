"""How others load a folder: by odd names, from a hub's cache, several processes at once, copied and pickled.

transformers copies a folder's code to a cache of its own, under a module name made of the folder's; what goes wrong there
goes wrong only outside this project, so nothing here uses its loader.
"""

import copy
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ssa_megatron.hf.export import CODE

TOKENS = torch.arange(3, 93)[None]
ALONE = """
import pathlib, pickle, sys, time
import torch
from transformers import AutoModelForCausalLM
folder, gate, out = map(pathlib.Path, sys.argv[1:])
(out.parent / (out.name + ".ready")).touch()
while not gate.exists():
    time.sleep(0.01)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
with torch.no_grad():
    torch.save(model(torch.arange(3, 93)[None], inference_mode="sparse").logits, out)
"""


def load(name, **options):
    return AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True, dtype="auto", **options).eval()


@torch.no_grad()
def logits(model):
    return model(TOKENS, inference_mode="sparse").logits


@pytest.mark.parametrize("name", ["v1.2-final 3", "1st", "class", "step-00000200", "x.py", "torch", "mod\u00e8le"])
def test_a_folder_may_have_any_name(folder, tmp_path, name):
    shutil.copytree(folder, tmp_path / name)
    assert torch.equal(logits(load(tmp_path / name)), logits(load(folder)))
    assert AutoTokenizer.from_pretrained(tmp_path / name, trust_remote_code=False)("a b")["input_ids"]


def test_a_repository_in_a_hubs_cache_loads_and_what_is_saved_of_it_needs_no_hub(folder, tmp_path):
    """The layout that downloads leave: files are links to blobs, and code is kept by commit."""
    commit = hashlib.sha1(b"commit").hexdigest()
    repository = tmp_path / "hub" / "models--my-org--ssa-1.3b"
    snapshot = repository / "snapshots" / commit
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for file in folder.iterdir():
        blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    model = load("my-org/ssa-1.3b", cache_dir=tmp_path / "hub", local_files_only=True)
    assert commit in type(model).__module__
    assert torch.equal(logits(model), logits(load(folder)))
    model.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").glob("*.py")} == set(CODE)
    assert "my-org" not in (tmp_path / "saved" / "config.json").read_text()
    shutil.rmtree(tmp_path / "hub")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def load_at_once(folder, place, environments):
    """The logits of as many processes, none of which begins to load before all have imported what they need."""
    gate, outs = place / "gate", [place / f"{number}.pt" for number in range(len(environments))]
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", ALONE, str(folder), str(gate), str(out)], env=environment,
            cwd=place, stderr=subprocess.PIPE, text=True,
        )
        for out, environment in zip(outs, environments, strict=True)
    ]  # fmt: skip
    ready = [place / f"{out.name}.ready" for out in outs]
    while any(one.poll() is None for one in started) and not all(path.exists() for path in ready):
        time.sleep(0.05)
    gate.touch()
    said = [one.communicate(timeout=120)[1] for one in started]
    assert not any(one.returncode for one in started), said
    return [torch.load(out) for out in outs]


@pytest.mark.parametrize("cache", ["filled before", "one each"])
def test_processes_that_load_at_once_all_do(folder, tmp_path, cache):
    """transformers fills an empty shared cache by copying in place: one may read half a file (docs/huggingface.md)."""
    common = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    environments = [common] * 3
    if cache == "one each":
        environments = [common | {"HF_MODULES_CACHE": str(tmp_path / f"modules-{number}")} for number in range(3)]
    else:
        (tmp_path / "first").mkdir()
        load_at_once(folder, tmp_path / "first", [common])
    want = logits(load(folder))
    for got in load_at_once(folder, tmp_path, environments):
        assert torch.equal(got, want)


def test_a_copy_is_a_model_of_its_own_and_a_pickled_one_comes_back(folder, tmp_path):
    model = load(folder)
    want = logits(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), want)
        twin.set_attention(inference_mode="sparse", block_count=1)
        with torch.no_grad():
            assert not torch.equal(twin(TOKENS).logits, want)
    assert (model.config.inference_mode, model.config.block_count) == ("full", 3)
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(logits(torch.load(tmp_path / "model.pt", weights_only=False)), want)
