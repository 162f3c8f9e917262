"""The folder alone in a process with torch and transformers only: the barrier is real, the answers are the same."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

from ssa_megatron.errors import EnvironmentProblem
from ssa_megatron.evaluation.perplexity import perplexity
from ssa_megatron.hf import isolated
from ssa_megatron.hf.generate import generate
from tests.errors import raises

REFUSED = (
    "ssa_kernels",
    "ssa_megatron",
    "ssa_pipelines",
    "sentencepiece",
    "deepspeed",
    "megatron",
    "streaming",
    "pytest",
    "tests",
)
NEEDED = ("torch", "transformers", "tokenizers", "safetensors", "json", "sysconfig", "zoneinfo")


def child(message, cwd):
    """The child by itself, with a message of our making."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", isolated.__file__],
        input=json.dumps(message),
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_project_and_training_libraries_cannot_be_imported_behind_the_barrier():
    required = isolated.requirements_of("torch", "transformers")
    allowed = set().union(*required.values()) - isolated.NEVER
    here = [name for name in REFUSED if importlib.util.find_spec(name)]
    assert {"ssa_megatron", "ssa_kernels", "ssa_pipelines", "sentencepiece", "megatron", "streaming"} <= set(here)
    message = {
        "path": sys.path,
        "allowed": sorted(allowed),
        "distributions": sorted(required),
        "job": {"probe": [*REFUSED, *NEEDED]},
    }
    tried = child(message, cwd=str(isolated.Path(isolated.__file__).parents[2]))
    for name in REFUSED:
        assert tried[name] == f"ModuleNotFoundError: No module named '{name}'"
    for name in NEEDED:
        assert tried[name] == "imported"


def test_barrier_refuses_the_project_even_if_it_were_on_the_list_of_requirements():
    message = {
        "path": sys.path,
        "allowed": list(isolated.NEVER),
        "distributions": [],
        "job": {"probe": sorted(isolated.NEVER)},
    }
    tried = child(message, cwd=str(isolated.Path(isolated.__file__).parents[2]))
    assert all(answer.startswith("ModuleNotFoundError") for answer in tried.values())


def test_folder_generates_and_scores_the_same_alone_as_here(folder):
    prompts = ["The model", "Every", "def f(x):\n    return"]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 690, (3, 96), generator=generator)
    starts = torch.where(torch.arange(96) < 41, 0, 41).expand(3, -1)
    documents = [part for row in tokens.tolist() for part in (row[:41], row[41:])]
    modes = ({"mode": "full"}, {"mode": "sparse"}, {"mode": "sparse", "block_count": 2})
    answer = isolated.run_isolated(
        {
            "folder": str(folder),
            "generate": [{"prompts": prompts, "max_new_tokens": 12, **mode} for mode in modes],
            "documents": documents,
            "perplexity": list(modes),
            "pipeline": prompts[:2],
        }
    )
    texts = generate(folder, prompts[:2], max_new_tokens=8)
    assert answer["pipeline"] == [prompt + text for prompt, text in zip(prompts, texts, strict=False)]
    assert not set(answer["imported"]) & {*REFUSED, "google", "numba", "triton"}
    assert {"torch", "transformers", "transformers_modules"} <= set(answer["imported"])
    for mode, generated, scored in zip(modes, answer["generated"], answer["perplexity"], strict=True):
        assert generated["texts"] == generate(folder, prompts, max_new_tokens=12, **mode)
        here = perplexity(folder, tokens, starts, **mode)
        assert scored["tokens"] == here.tokens == 3 * 94
        assert scored["nats_per_token"] == pytest.approx(here.nats_per_token, rel=1e-9)
    full, sparse, two = (entry["nats_per_token"] for entry in answer["perplexity"])
    assert full != two != sparse


def test_failure_in_the_isolated_process_is_reported_with_its_reason(tmp_path):
    with raises(EnvironmentProblem, "isolated-failed", "config.json"):
        isolated.run_isolated({"folder": str(tmp_path)})
    with raises(EnvironmentProblem, "isolated-timeout", "0 s"):
        isolated.run_isolated({"folder": str(tmp_path)}, timeout_s=0.05)
