"""Training goes on from an imported folder as from any checkpoint, at another topology too, and says what does not fit."""

import shutil

import pytest
import torch

from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.config import dump_recipe, load_recipe
from ssa_megatron.hf.importing import import_folder
from ssa_megatron.train.data import ledger_of_step, open_stream
from ssa_megatron.train.metrics import read_metrics
from tests.launch import run as launch
from tests.oracle import model as oracle

SMALL = ("train.sequence_length=33", "train.global_batch_rows=4", "train.steps=3", "optimizer.lr=1e-3",
         "schedule.warmup_fraction=0", "checkpoint.interval=2", "attention.block_size=4", "attention.block_count=3",
         "attention.sparse_probability=0")  # fmt: skip


@pytest.fixture(scope="module")
def imported(tmp_path_factory, tokenizer):
    """The run folder of a random Llama whose vocabulary is the dataset's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    (folder / "hf" / "tokenizer.model").write_bytes(tokenizer.model)
    import_folder(folder / "hf", folder / "run", SMALL)
    return folder / "run"


def oracle_loss(run, dataset) -> float:
    """Of the imported weights on the rows of the first step, fp64."""
    recipe = load_recipe(str(run / "recipe.yaml"), [f"data.path={dataset}"])
    m, a, checkpoint = recipe.model, recipe.attention, Checkpoint.open(run, step=0)
    config = oracle.OracleConfig(
        m.vocab_size, m.hidden_size, m.num_layers, m.num_heads, m.num_kv_heads, m.head_dim, m.ffn_size,
        rope_theta=m.rope_theta, norm_eps=m.norm_eps, tied=m.tied_embeddings, block_size=a.block_size,
        block_count=a.block_count,
    )  # fmt: skip
    weights = {name: checkpoint.tensor(name).double() for name in checkpoint.names()}
    stream = open_stream(recipe, 0, 1)
    rows = [next(stream) for _ in range(recipe.train.global_batch_rows)]
    stream.close()
    tokens, starts = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return oracle.losses(weights, config, tokens, starts, "full")[0].item()


@pytest.mark.parametrize(
    ("processes", "overrides"),
    [
        (1, ()),
        pytest.param(2, ("parallel.tensor=2", "parallel.sequence=false"), marks=pytest.mark.slow),
        pytest.param(2, ("zero.stage=3", "train.precision=bf16"), marks=pytest.mark.slow),
        pytest.param(2, ("parallel.pipeline=2",), marks=pytest.mark.slow),
    ],
)
def test_the_first_step_is_taken_from_the_imported_weights(tmp_path, imported, dataset, processes, overrides):
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    command = ("ssa_megatron", "train", str(run / "recipe.yaml"), f"data.path={dataset}", "--run-folder", str(run))
    output = launch(processes, *command, *overrides)
    assert "restored step-00000000" in output
    lines = read_metrics(run / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    exact = "train.precision=bf16" not in overrides
    assert lines[0]["loss"] == pytest.approx(oracle_loss(run, dataset), rel=1e-5 if exact else 2e-2)
    assert len({line["loss"] for line in lines}) == 3
    last = Checkpoint.open(run)
    assert (last.manifest["step"], last.content.state["applied_steps"]) == (3, 3)
    assert not last.content.is_start


@pytest.mark.slow
def test_another_model_and_other_data_are_refused_before_a_step(tmp_path, imported, dataset, corpus):
    import ssa_pipelines

    command = ("ssa_megatron", "train", str(imported / "recipe.yaml"), "--run-folder", str(imported))
    output = launch(1, *command, f"data.path={dataset}", "model.norm_eps=1e-3", expect=4)
    assert "holds the weights of another model" in output
    assert "norm_eps: 1e-06 -> 0.001" in output
    other = ssa_pipelines.train_tokenizer(iter(corpus), tmp_path / "other.model", vocab_size=390)
    ssa_pipelines.prepare(iter(corpus), other, tmp_path / "data", row_length=33, validation_fraction=0.1)
    output = launch(1, *command, f"data.path={tmp_path / 'data'}", expect=4)
    assert "was trained with tokenizer" in output
    assert not (imported / "metrics.jsonl").exists()


def test_the_ledger_of_a_run_that_has_only_its_start_is_that_of_its_recipe(tmp_path, imported, dataset):
    run = tmp_path / "run"
    shutil.copytree(imported, run)
    recipe = load_recipe(str(run / "recipe.yaml"), [f"data.path={dataset}"])
    (run / "config.yaml").write_text(dump_recipe(recipe))
    assert len(list(ledger_of_step(run, 1))) == 4
