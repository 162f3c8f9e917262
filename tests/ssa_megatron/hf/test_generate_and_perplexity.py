"""Generation and perplexity from a folder: repeatable, equal to the oracle, clear about what is wrong."""

import math
import shutil

import pytest
import torch

from ssa_megatron.errors import CheckpointError, ConfigError, DataProblem
from ssa_megatron.evaluation.perplexity import perplexity, split_documents
from ssa_megatron.hf import bare
from ssa_megatron.hf.generate import generate, open_folder
from tests.errors import raises
from tests.oracle import model as oracle

from .conftest import oracle_config, tiny_recipe


@pytest.fixture(scope="module")
def opened(folder):
    return open_folder(folder)


@pytest.fixture(scope="module")
def rows():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, 690, (4, 128), generator=generator)
    starts = torch.zeros(4, 128, dtype=torch.int32)
    starts[1, 33:] = 33
    starts[2, 100:] = 100
    starts[2, 127:] = 127  # a document of one token: nothing to predict
    return tokens, starts


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_perplexity_is_the_oracles_on_packed_rows(opened, rows, weights, mode):
    exact = {name: weight.float().double() for name, weight in weights.items()}
    want, _ = oracle.losses(exact, oracle_config(tiny_recipe()), *rows, mode)
    got = perplexity(opened[0], *rows, mode=mode)
    assert got.nats_per_token == pytest.approx(want.item(), rel=1e-5)
    assert got.perplexity == math.exp(got.nats_per_token)
    assert got.tokens == 4 * 128 - 7
    assert (got.mode, got.block_count) == (mode, 3 if mode == "sparse" else None)


def test_batching_does_not_change_perplexity(opened, rows):
    whole = perplexity(opened[0], *rows, mode="sparse")
    for batch_tokens in (1, 130, 1 << 20):
        got = perplexity(opened[0], *rows, mode="sparse", batch_tokens=batch_tokens)
        assert got.nats_per_token == pytest.approx(whole.nats_per_token, rel=1e-6)
        assert got.tokens == whole.tokens


def test_documents_are_split_at_their_starts(rows):
    tokens, starts = rows
    documents = split_documents(tokens, starts)
    assert list(map(len, documents)) == [128, 33, 95, 100, 27, 1, 128]
    assert [token for document in documents for token in document] == tokens.flatten().tolist()


def test_greedy_text_does_not_depend_on_the_batch_the_seed_or_the_cache(folder, opened):
    prompts = ["The model", "In", "    return value, other\n\n"]
    together = generate(folder, prompts, mode="sparse", max_new_tokens=20)
    assert together == [generate(folder, [p], mode="sparse", max_new_tokens=20, seed=9)[0] for p in prompts]
    assert together == bare.generate_texts(*opened, prompts, mode="sparse", max_new_tokens=20, use_cache=False)


def test_sampled_text_is_repeatable_by_seed_and_leaves_the_global_generator_alone(folder):
    state = torch.get_rng_state()
    options = {"mode": "full", "max_new_tokens": 16, "temperature": 1.5, "top_p": 0.95}
    first, again, other = (generate(folder, ["The"], seed=seed, **options) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments_are_named(folder, opened, rows):
    with raises(ConfigError, "unknown-mode", "mode='dense'"):
        generate(folder, ["x"], mode="dense")
    with raises(ConfigError, "block-count", "block_count=0"):
        perplexity(opened[0], *rows, block_count=0)
    with raises(ConfigError, "no-prompts"):
        generate(folder, "x")
    with raises(ConfigError, "max-new-tokens", "max_new_tokens=0"):
        generate(folder, ["x"], max_new_tokens=0)
    with raises(ConfigError, "sampling", "top_p=0"):
        generate(folder, ["x"], temperature=1, top_p=0)
    tokens, starts = rows
    with raises(DataProblem, "rows-document-starts", "doc_starts[0, 5] = 3"):
        perplexity(opened[0], tokens, starts + 3 * (torch.arange(128) == 5))
    with raises(DataProblem, "rows-shape"):
        perplexity(opened[0], tokens[0], starts[0])
    with raises(DataProblem, "token-outside-vocabulary", 100000):
        perplexity(opened[0], tokens.clamp(min=100000), starts)
    with raises(DataProblem, "documents-too-short"):
        perplexity(opened[0], tokens, torch.arange(128).expand(4, -1))


@pytest.mark.parametrize(
    ("file", "damage", "id", "mentions"),
    [
        ("config.json", None, "not-an-export", ["config.json"]),
        ("tokenizer.json", None, "not-an-export", ["tokenizer.json"]),
        ("model.safetensors", None, "export-not-loaded", []),
        ("model.safetensors", lambda content: content[:-100], "export-damaged", []),
        (
            "model.safetensors",
            lambda content: content.replace(b"model.norm.weight", b"model.nora.weight"),
            "export-not-loaded",
            ["model.nor"],
        ),
        (
            "config.json",
            lambda content: content.replace(b'"hidden_size": 32', b'"hidden_size": 64'),
            "export-not-loaded",
            ["config.json"],
        ),
        (
            "config.json",
            lambda content: content.replace(b'"vocab_size": 700', b'"vocab_size": 640'),
            "export-not-loaded",
            ["embed_tokens.weight", (700, 32), (640, 32)],
        ),
        (
            "config.json",
            lambda content: content.replace(b'_kind": "ssa"', b'_kind": "abc"'),
            "export-not-loaded",
            ["attention_kind='abc'"],
        ),
    ],
)
def test_broken_folders_are_refused_in_one_line(folder, tmp_path, file, damage, id, mentions):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    content = (broken / file).read_bytes()
    (broken / file).unlink()
    if damage:
        assert damage(content) != content
        (broken / file).write_bytes(damage(content))
    with raises(CheckpointError, id, *mentions) as raised:
        generate(broken, ["x"])
    assert "\n" not in raised.value.problem
