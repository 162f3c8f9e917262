"""Export of a checkpoint in the real format: weights bit for bit, any dtype, several shards, and every refusal."""

import dataclasses
import errno
import hashlib
import json
import os
import shutil

import pytest
import tokenizers
import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import ssa_pipelines
from ssa_megatron.checkpoint.manifest import Manifest, step_folder
from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.errors import CheckpointError, ConfigError, DataProblem, EnvironmentProblem
from ssa_megatron.hf import export as export_module
from ssa_megatron.hf.bundle import modeling_ssa
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from ssa_megatron.hf.export import config_of, expected_shapes, export, open_weights, write_weights
from ssa_megatron.hf.importing import import_folder
from ssa_megatron.model.shapes import global_shapes
from tests.errors import raises
from tests.launch import run as launch
from tests.oracle import model as oracle

from .conftest import corpus, oracle_config, tiny_recipe, write_run


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()


def test_folder_holds_the_checkpoints_weights_and_computes_the_oracles_logits(folder, weights):
    model = load(folder)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(parameters[name], weight.float())
    tokens = torch.arange(3, 103)[None]
    exact = {name: weight.float().double() for name, weight in weights.items()}
    for mode in ("full", "sparse"):
        want = oracle.logits(exact, oracle_config(tiny_recipe()), tokens, torch.zeros_like(tokens), mode)
        with torch.no_grad():
            got = model.double()(tokens, inference_mode=mode).logits
        assert (got - want).abs().max() < 1e-10


def test_folder_has_everything_a_reader_needs(folder, run):
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors", "configuration_ssa.py", "modeling_ssa.py"),
        *("attention_ssa.py", "cache_ssa.py", "positions_ssa.py", "triton_ssa.py"),
        *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "README.md", "parity.json"),
        "tokenizer.model",
    }
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.model_type, config.attention_kind, config.block_count) == ("ssa", "ssa", 3)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 2)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    digest = Checkpoint.open(run).manifest["recipe_digest"]
    card = (folder / "README.md").read_text()
    assert digest in card
    assert "trust_remote_code=True" in card
    assert not list(folder.parent.glob(".tmp-*"))


def test_parity_report_names_every_file_with_its_sha256(folder):
    parity = json.loads((folder / "parity.json").read_text())
    assert parity["weights_bit_equal"] is True
    assert parity["step"] == 9
    forward = parity["forward"]
    assert forward["full_minus_sparse_all_blocks"] == 0
    assert forward["logits_full_minus_sparse_2_blocks"] > 1e-3
    assert 0 < max(forward["trainer_minus_export"].values()) < 1e-9 < forward["logits_max_abs"]
    assert forward["ties_left_out"] == 0
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    files.pop("parity.json")
    assert parity["files"] == files


def test_generation_through_the_pipeline_of_transformers_works(folder):
    from transformers import pipeline

    generator = pipeline(
        "text-generation", model=load(folder), tokenizer=AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    )
    text = generator("The model", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert text.startswith("The model")


@pytest.mark.parametrize(("kind", "tied"), [("full", False), ("moba", True), ("nsa", False)])
def test_other_kinds_and_untied_models_export(tmp_path, tokenizer, kind, tied):
    recipe = tiny_recipe(kind, tied=tied)
    weights = oracle.random_weights(oracle_config(recipe), seed=2)
    out = export(write_run(tmp_path / "run", recipe, weights, tokenizer), tmp_path / "out")
    parameters = dict(load(out).named_parameters())
    assert parameters.keys() == weights.keys() == global_shapes(recipe).keys()
    assert all(torch.equal(parameters[name], weight.float()) for name, weight in weights.items())


def test_working_precision_is_kept_and_another_dtype_can_be_had(tmp_path, tokenizer, weights):
    run = write_run(tmp_path / "run", tiny_recipe(), weights, tokenizer, bf16=True)
    for wanted, dtype in ((None, torch.bfloat16), ("fp32", torch.float32), (torch.float16, torch.float16)):
        model = load(export(run, tmp_path / f"out-{wanted}", dtype=wanted))
        assert model.dtype == dtype
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, weights[name].bfloat16().to(dtype))


def test_a_large_model_becomes_several_shards_with_an_index(tmp_path, run, weights, monkeypatch):
    monkeypatch.setattr(export_module, "SHARD_BYTES", 40_000)
    monkeypatch.setattr(export_module.write_weights, "__defaults__", (40_000,))
    out = export(run, tmp_path / "out")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert set(index["weight_map"].values()) == {path.name for path in out.glob("*.safetensors")}
    assert len(set(index["weight_map"].values())) > 2
    assert all(torch.equal(p, weights[name].float()) for name, p in load(out).named_parameters())


def test_save_pretrained_of_a_loaded_folder_loads_again_with_its_code(tmp_path, folder):
    model = load(folder).set_attention(inference_mode="sparse", block_count=2)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert (tmp_path / "again" / "triton_ssa.py").read_bytes() == (folder / "triton_ssa.py").read_bytes()
    assert (again.config.inference_mode, again.config.block_count) == ("sparse", 2)
    tokens = torch.arange(90)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_context_mode_and_budget_can_be_chosen_at_load(folder):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    changed = {"rope_scaling": yarn, "inference_mode": "sparse", "block_count": 2}
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto", **changed).eval()
    plain, tokens = load(folder), torch.arange(90)[None]
    assert model.config.rope_parameters["rope_theta"] == plain.config.rope_parameters["rope_theta"]
    with torch.no_grad():
        got, want = model(tokens).logits, plain(tokens, inference_mode="sparse", block_count=2).logits
        assert (got - want).abs().max() > 1e-3
        plain.config.rope_scaling = yarn
        assert torch.equal(got, plain(tokens, inference_mode="sparse", block_count=2).logits)
    for wrong in ({"inference_mode": "spars"}, {"block_count": 0}, {"sparse_backend": "cuda"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):  # not at the first forward, after minutes of loading
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **wrong)
    with pytest.raises(ValueError, match="rope_type='dynamic'"):
        plain.config.rope_scaling = {"rope_type": "dynamic", "factor": 2.0}


def test_step_chooses_the_checkpoint_and_an_unknown_one_is_named(tmp_path, tokenizer, weights):
    run = tmp_path / "run"
    write_run(run, tiny_recipe(), weights, tokenizer, step=4)
    write_run(run, tiny_recipe(), {name: weight + 1 for name, weight in weights.items()}, tokenizer, step=8)
    export(run, tmp_path / "four", step=4)
    export(step_folder(run, 8), tmp_path / "eight")
    four, eight = (json.loads((tmp_path / name / "parity.json").read_text()) for name in ("four", "eight"))
    assert (four["step"], eight["step"]) == (4, 8)
    assert four["weights_sha256"] != eight["weights_sha256"]
    with raises(CheckpointError, "no-checkpoint-of-step", 5):
        export(run, tmp_path / "five", step=5)


# ------------------------------------------------------------------------------------------------------------- refusals
def copied(run, tmp_path, **changes):
    """A copy of the run whose manifest is changed."""
    shutil.copytree(run, tmp_path / "changed")
    folder = step_folder(tmp_path / "changed", 9)
    (folder / "manifest.json").write_text(dataclasses.replace(Manifest.read(folder), **changes).to_json())
    return tmp_path / "changed"


def assert_refused(error, id, source, out, *mentions, **options):
    with raises(error, id, *mentions):
        export(source, out, **options)
    assert_nothing_left(out)


def assert_nothing_left(out):
    assert not [path for path in out.parent.iterdir() if path.name.startswith((out.name, ".tmp-"))]


def test_an_existing_out_is_left_alone(tmp_path, run):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("precious")
    with raises(ConfigError, "export-folder-exists", out):
        export(run, out)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_wrong_arguments_are_named(tmp_path, run):
    assert_refused(ConfigError, "unknown-dtype", run, tmp_path / "out", "'int8'", dtype="int8")
    assert_refused(CheckpointError, "no-committed-checkpoint", tmp_path, tmp_path / "out")


def test_a_missing_weight_and_an_unknown_one_are_named(tmp_path, run):
    tensors = Manifest.read(step_folder(run, 9)).tensors
    gone = tensors.pop("model.layers.1.self_attn.g_proj.weight")
    changed = copied(run, tmp_path, tensors=tensors | {"model.extra.weight": gone})
    names = ("model.layers.1.self_attn.g_proj.weight", "model.extra.weight")
    assert_refused(CheckpointError, "export-names-differ", changed, tmp_path / "out", *names)


def test_a_recipe_with_other_sizes_or_another_kind_is_refused(tmp_path, run):
    recipe = Manifest.read(step_folder(run, 9)).recipe
    other = json.loads(json.dumps(recipe))
    other["model"]["ffn_size"] = 50
    changed = copied(run, tmp_path, recipe=other)
    assert_refused(CheckpointError, "export-shape-differs", changed, tmp_path / "out", (48, 32))
    shutil.rmtree(tmp_path / "changed")
    other = json.loads(json.dumps(recipe))
    other["attention"]["kind"] = "dense"
    changed = copied(run, tmp_path, recipe=other)
    assert_refused(CheckpointError, "recipe-not-exportable", changed, tmp_path / "out", "attention_kind='dense'")
    del other["attention"]
    with raises(CheckpointError, "recipe-field-missing", "'attention'"):
        config_of(other)


def test_a_damaged_weight_file_is_named(tmp_path, run):
    changed = copied(run, tmp_path)
    path = step_folder(changed, 9) / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert_refused(CheckpointError, "checkpoint-file-altered", changed, tmp_path / "out", "rank-00001.safetensors")


def test_a_missing_or_foreign_tokenizer_is_named(tmp_path, run, tokenizer):
    changed = copied(run, tmp_path)
    (changed / "tokenizer.model").write_bytes(tokenizer.model + b"\x00")
    assert_refused(DataProblem, "export-another-tokenizer", changed, tmp_path / "out", "tokenizer.model")
    (changed / "tokenizer.model").unlink()
    assert_refused(DataProblem, "tokenizer-missing", changed, tmp_path / "out", "tokenizer.model")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path, tokenizer):
    recipe = tiny_recipe(vocab_size=300)
    weights = oracle.random_weights(oracle_config(recipe), seed=2)
    run = write_run(tmp_path / "run", recipe, weights, tokenizer)
    assert_refused(DataProblem, "tokenizer-too-large", run, tmp_path / "out", 697, 300)


def test_weights_that_reload_differently_stop_the_export(tmp_path, run, monkeypatch):
    def damaging(weights, folder, *limit):
        changed = ((name, tensor + (name == "model.norm.weight")) for name, tensor in weights)
        return write_weights(changed, folder, *limit)

    monkeypatch.setattr(export_module, "write_weights", damaging)
    assert_refused(CheckpointError, "reloaded-tensor-differs", run, tmp_path / "out", "model.norm.weight")


@pytest.mark.parametrize("kind", ["full", "moba", "nsa", "ssa"])
def test_a_class_that_computes_something_else_stops_the_export(tmp_path, tokenizer, kind, monkeypatch):
    """Each change is a plausible mistake that leaves every weight as it is."""
    recipe = tiny_recipe(kind)
    run = write_run(tmp_path / "run", recipe, oracle.random_weights(oracle_config(recipe), seed=2, std=0.3), tokenizer)
    plain = modeling_ssa.rotate
    mistakes = {
        "rotate": lambda x, table: plain(x, (table[0], -table[1])),
        "full_stream": lambda q, k, v, *_: torch.nn.functional.scaled_dot_product_attention(
            q, *(x.repeat_interleave(2, 1) for x in (k, v))
        ),
        "pool_blocks": lambda x, *a, plain=modeling_ssa.pool_blocks: plain(x, *a).roll(1, 2),
    }
    if kind != "nsa":
        del mistakes["pool_blocks"]  # it moves nsa's compressed stream for certain; others only if a choice changes
    for name, mistake in mistakes.items():
        with monkeypatch.context() as patch:
            patch.setattr(modeling_ssa, name, mistake)
            with pytest.raises(CheckpointError) as refused:
                export(run, tmp_path / "out")
            assert refused.value.id in ("layer-differs", "sparse-differs-from-full")
            assert_nothing_left(tmp_path / "out")
    export(run, tmp_path / "out")


def test_blocks_with_equal_scores_do_not_stop_the_export(tmp_path, tokenizer, weights):
    """Heads whose queries are almost nothing: which block is first is a matter of rounding, in fp64 too."""
    dead = {name: weight * 1e-9 if "q_proj" in name else weight for name, weight in weights.items()}
    out = export(write_run(tmp_path / "run", tiny_recipe(), dead, tokenizer), tmp_path / "out")
    forward = json.loads((out / "parity.json").read_text())["forward"]
    assert forward["ties_left_out"] > 20
    assert max(forward["trainer_minus_export"].values()) < 1e-9


def test_the_card_shows_the_trainers_perplexity_in_both_modes_and_the_datas_fingerprint(tmp_path, run):
    changed = copied(run, tmp_path, state={"step": 9, "data": {"datasets": {"": "f00d"}}})
    lines = [{"step": 4, "eval/loss_full": 3.0}, {"step": 8, "eval/loss_full": 2.0, "eval/loss_sparse": 2.5}, {"step": 9},
             {"step": 12, "eval/loss_full": 1.0, "eval/loss_sparse": 1.0}]  # fmt: skip
    (changed / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = (export(changed, tmp_path / "out") / "README.md").read_text()
    assert "7.389 full, 12.182 sparse (validation rows, at step 8)" in card
    assert "`f00d`" in card


def test_a_run_with_a_hugging_face_tokenizer_exports_and_tokenizes_as_its_data_did(tmp_path, weights):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet, marks = tokenizers.pre_tokenizers.ByteLevel.alphabet(), ["<|begin_of_text|>", "<|end_of_text|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([corpus()], trainer)
    made.save(str(tmp_path / "tokenizer.json"))
    own = ssa_pipelines.Tokenizer.load(tmp_path / "tokenizer.json")
    run = write_run(tmp_path / "run", tiny_recipe(), weights, own)
    (run / "tokenizer.model").unlink()
    for name, content in own.files.items():
        (run / name).write_bytes(content)
    manifest = Manifest.read(step_folder(run, 9))
    (step_folder(run, 9) / "manifest.json").write_text(
        dataclasses.replace(manifest, tokenizer_fingerprint=own.fingerprint).to_json()
    )
    out = export(run, tmp_path / "out")
    assert not (out / "tokenizer.model").exists()
    text = "In the beginning\n  <|end_of_text|> \u00e9\U0001f600"
    loaded = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    assert loaded(text)["input_ids"] == [own.bos_id, *own.encode([text])[0]]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    config = load(out).config
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (own.bos_id, own.eos_id, own.eos_id)
    import_folder(out, tmp_path / "again")
    again = export(tmp_path / "again", tmp_path / "out-again")
    assert (again / "tokenizer.json").read_bytes() == (out / "tokenizer.json").read_bytes()


def test_an_interrupted_export_leaves_nothing(tmp_path, run, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "_check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out")
    assert_nothing_left(tmp_path / "out")


def test_a_place_that_cannot_be_written_and_a_full_disk_are_named(tmp_path, run, folder, monkeypatch):
    """Regression: both ended in a traceback."""
    (tmp_path / "file").write_text("")
    for make, source in ((export, run), (import_folder, folder)):
        with raises(EnvironmentProblem, "output-not-written", tmp_path / "file" / "model") as raised:
            make(source, tmp_path / "file" / "model")
        assert raised.value.exit_code == 7

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(export_module, "write_weights", full)
    assert_refused(EnvironmentProblem, "output-not-written", run, tmp_path / "out", os.strerror(errno.ENOSPC))

    def full_for_safetensors(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export_module, "write_weights", full_for_safetensors)
    assert_refused(EnvironmentProblem, "output-not-serialised", run, tmp_path / "out", os.strerror(errno.ENOSPC))
    monkeypatch.setattr("ssa_megatron.hf.importing.write_start", full)
    with raises(EnvironmentProblem, "output-not-written", os.strerror(errno.ENOSPC)):
        import_folder(folder, tmp_path / "imported")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_weights_are_read_one_at_a_time_in_model_order(run):
    checkpoint = Checkpoint.open(run)
    expected = expected_shapes(config_of(checkpoint.recipe))
    assert expected == global_shapes(tiny_recipe())
    assert [name for name, _ in open_weights(checkpoint, expected, None)] == list(expected)


def test_class_loaded_from_the_package_and_from_the_folder_agree(folder):
    own = SSAForCausalLM.from_pretrained(folder).eval()
    tokens = torch.arange(60)[None]
    with torch.no_grad():
        assert torch.equal(own(tokens).logits, load(folder)(tokens).logits)


@pytest.mark.slow
def test_neither_export_nor_import_holds_the_model_twice(tmp_path):
    """One shard while writing (here the whole model, as any under 5 GB), one layer while proving."""
    launch(1, "tests.workers.export_memory", str(tmp_path), str(tmp_path / "memory.json"), timeout=240)
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["weights"] > 150e6
    assert found["export"] < 1.3 * found["weights"]
    assert found["import"] < 1.3 * found["weights"]
