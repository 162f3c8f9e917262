"""A tiny run folder in the real checkpoint format (two ranks' files, manifest, tokenizer) and its export."""

import difflib
import hashlib
import heapq
import inspect
import pickletools
import textwrap
from pathlib import Path

import pytest
import torch

from ssa_megatron.checkpoint.manifest import Manifest, step_folder
from ssa_megatron.checkpoint.tensor_file import write_safetensors
from ssa_megatron.config.recipe import digest, resolve
from ssa_megatron.hf.export import export
from ssa_pipelines import train_tokenizer
from tests.oracle import model as oracle

VOCAB = 700


def corpus() -> str:
    """English, code, indentation and odd characters from the standard library: no edit here changes it."""
    odd = "\u00b7 \u2014 \u2192 \u2581 caf\u00e9 \u65e5\u672c\u8a9e \U0001f600"
    return "\n".join([*map(inspect.getsource, (difflib, textwrap, pickletools, heapq)), odd])


def tiny_recipe(kind: str = "ssa", *, tied: bool = True, **model):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "ffn_size": 48,
        "max_sequence_length": 128,
        "tied_embeddings": tied,
    }
    return resolve(
        {
            "name": "tiny",
            "model": sizes | model,
            "attention": {"kind": kind, "block_count": 3},
            "train": {"steps": 9, "sequence_length": 128, "global_batch_rows": 1, "micro_batch_rows": 1},
        },
        origin="tests/ssa_megatron/hf",
    )


def oracle_config(recipe) -> oracle.OracleConfig:
    m, a = recipe.model, recipe.attention
    return oracle.OracleConfig(
        vocab_size=m.vocab_size,
        hidden_size=m.hidden_size,
        num_layers=m.num_layers,
        num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads,
        head_dim=m.head_dim,
        ffn_size=m.ffn_size,
        rope_theta=m.rope_theta,
        norm_eps=m.norm_eps,
        tied=m.tied_embeddings,
        kind=a.kind,
        block_size=a.block_size,
        block_count=a.block_count,
        window=a.window,
    )


def write_run(run: Path, recipe, weights: dict, tokenizer, *, step: int = 9, bf16: bool = False) -> Path:
    """Commit one checkpoint as two data-parallel ranks would: each holds half of every tensor's elements."""
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    (run / "tokenizer.model").write_bytes(tokenizer.model)
    shares: list[dict] = [{}, {}]
    tensors: dict = {}
    for name, weight in weights.items():
        kinds = {"master": weight.float()} | ({"weight": weight.bfloat16()} if bf16 else {})
        for kind, tensor in kinds.items():
            flat, shape, pieces = tensor.flatten(), list(tensor.shape), []
            edges = (0, flat.numel() // 2, flat.numel())
            for rank in (0, 1):
                key = f"{kind}/{name}#{len(shares[rank])}"
                shares[rank][key] = flat[edges[rank] : edges[rank + 1]]
                where = {"offset": [0] * len(shape), "shape": shape, "range": [edges[rank], edges[rank + 1]]}
                pieces.append({"file": f"rank-{rank:05d}.safetensors", "key": key, **where})
            entry = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape, "pieces": pieces}
            tensors.setdefault(name, {})[kind] = entry
    files = {f"rank-{rank:05d}.safetensors": share for rank, share in enumerate(shares)}
    stored = {name: write_safetensors(folder / name, share) for name, share in files.items()}
    manifest = Manifest(
        step=step,
        state={},
        recipe=recipe.model_dump(),
        recipe_digest=digest(recipe),
        tokenizer_fingerprint=hashlib.sha256(tokenizer.model).hexdigest(),
        files=stored,
        tensors=tensors,
    )
    (folder / "manifest.json").write_text(manifest.to_json())
    return run


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_module_cache(tmp_path_factory):
    """transformers copies remote code to a cache in the user's home; not from a test."""
    from transformers import dynamic_module_utils
    from transformers.utils import hub

    folder = str(tmp_path_factory.getbasetemp() / "hf_modules")  # one a process: Python finds a package in one place
    patch = pytest.MonkeyPatch()
    for module in (dynamic_module_utils, hub):
        if hasattr(module, "HF_MODULES_CACHE"):
            patch.setattr(module, "HF_MODULES_CACHE", folder)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return train_tokenizer(iter([corpus()]), tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=VOCAB - 3)


@pytest.fixture(scope="session")
def weights():
    return oracle.random_weights(oracle_config(tiny_recipe()), seed=7, std=0.3)


@pytest.fixture(scope="session")
def run(tmp_path_factory, tokenizer, weights):
    return write_run(tmp_path_factory.mktemp("run"), tiny_recipe(), weights, tokenizer)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, run):
    return export(run, tmp_path_factory.mktemp("export") / "tiny-ssa")
