"""Import: our export back bit for bit, a Llama whose first forward is its own, the authors' layout, and every refusal."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import ssa_kernels
from ssa_megatron.checkpoint.initial import check_start
from ssa_megatron.checkpoint.manifest import step_folder
from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.errors import CheckpointError, ConfigError, DataProblem, SSAError
from ssa_megatron.hf.export import export
from ssa_megatron.hf.importing import import_folder
from ssa_pipelines import DataError
from tests.errors import raises
from tests.oracle import model as oracle

from .conftest import VOCAB, tiny_recipe, write_run

SCALING = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()


def tokens_of(length, rows=1, vocab=VOCAB):
    return torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(length))


def files_of(folder, *, but=("README.md", "parity.json")):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


# ------------------------------------------------------------------------------------------------------- our own export
@pytest.mark.parametrize("bf16", [False, True])
def test_our_export_comes_back_bit_for_bit_and_goes_out_again_as_the_same_files(tmp_path, tokenizer, weights, bf16):
    run = write_run(tmp_path / "run", tiny_recipe(), weights, tokenizer, bf16=bf16)
    out = export(run, tmp_path / "out")
    recipe = import_folder(out, tmp_path / "again")
    assert (recipe.model, recipe.attention) == (tiny_recipe().model, tiny_recipe().attention)
    original, back = Checkpoint.open(run), Checkpoint.open(tmp_path / "again")
    assert back.names() == original.names()
    for name in back.names():
        assert torch.equal(back.tensor(name), original.tensor(name))
        assert back.tensor(name, "master").dtype == torch.float32
    assert back.manifest["tokenizer_fingerprint"] == original.manifest["tokenizer_fingerprint"]
    assert files_of(export(tmp_path / "again", tmp_path / "out-again")) == files_of(out)


def test_a_sharded_folder_is_read_through_its_index(tmp_path, folder, weights):
    sharded = tmp_path / "sharded"
    load(folder).save_pretrained(sharded, max_shard_size="40KB")
    assert (sharded / "model.safetensors.index.json").exists()
    shutil.copyfile(folder / "tokenizer.model", sharded / "tokenizer.model")
    import_folder(sharded, tmp_path / "run")
    back = Checkpoint.open(tmp_path / "run")
    assert all(torch.equal(back.tensor(name), weight.float()) for name, weight in weights.items())


# ---------------------------------------------------------------------------------------------------------------- Llama
def llama(path, tokenizer, *, tied=False, dtype=torch.float32, **changes):
    torch.manual_seed(4)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    config = LlamaConfig(**{**sizes, **heads, "initializer_range": 0.2, "tie_word_embeddings": tied, **changes})
    LlamaForCausalLM(config).to(dtype).save_pretrained(path)
    (path / "tokenizer.model").write_bytes(tokenizer.model)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_llama_computes_what_it_computed_before_the_first_step_and_loads_back(tmp_path, tokenizer, tied, dtype):
    original = llama(tmp_path / "llama", tokenizer, tied=tied, dtype=dtype)
    recipe = import_folder(tmp_path / "llama", tmp_path / "run")
    assert (recipe.attention.kind, recipe.model.tied_embeddings) == ("ssa", tied)
    assert recipe.train.precision == ("fp32" if dtype == torch.float32 else "bf16")
    ours = load(export(tmp_path / "run", tmp_path / "out", dtype="fp32"))
    tokens = tokens_of(200, rows=2)
    with torch.no_grad():
        want = original(tokens).logits
        full, sparse = (ours(tokens, inference_mode=mode).logits for mode in ("full", "sparse"))
    assert want.abs().max() > 1
    assert (full - want).abs().max() <= 1e-5
    assert torch.equal(sparse, full)  # 16 blocks of 16 hold all of 200 tokens
    import_folder(tmp_path / "out", tmp_path / "run-again")
    first, again = Checkpoint.open(tmp_path / "run"), Checkpoint.open(tmp_path / "run-again")
    assert all(torch.equal(first.tensor(n, "master"), again.tensor(n, "master")) for n in first.names())


def test_gates_are_a_half_and_learn_from_the_first_step(tmp_path, tokenizer):
    llama(tmp_path / "llama", tokenizer)
    import_folder(tmp_path / "llama", tmp_path / "run", ["attention.block_count=2"])
    model = load(export(tmp_path / "run", tmp_path / "out")).train()
    model(tokens_of(60), labels=tokens_of(60), trunk="full").loss.backward()
    for layer in model.model.layers:
        assert not layer.self_attn.g_proj.weight.any()
        assert layer.self_attn.g_proj.weight.grad.abs().max() > 1e-6


def test_a_llama_with_scaled_rope_and_explicit_head_dim_agrees(tmp_path, tokenizer):
    scaling = {"rope_type": "llama3", **SCALING}
    changes = {"rope_theta": 10000.0, "rope_scaling": scaling, "head_dim": 16, "num_key_value_heads": 1}
    original = llama(tmp_path / "llama", tokenizer, **changes)
    recipe = import_folder(tmp_path / "llama", tmp_path / "run", ["attention.kind=moba"])
    assert recipe.model.rope_scaling.model_dump() == SCALING
    ours = load(export(tmp_path / "run", tmp_path / "out"))
    with torch.no_grad():
        difference = ours(tokens_of(250), inference_mode="full").logits - original(tokens_of(250)).logits
    assert difference.abs().max() <= 1e-5


# ----------------------------------------------------------------------------------------------------- the authors' own
AUTHORS = {
    "model_type": "llama-nsa", "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None, "tie_word_embeddings": True, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "block_size": 16, "block_counts": 16, "window_size": 0,
}  # fmt: skip


def authors_folder(path, tokenizer, **changes):
    """A folder of their layout (Llama's names and a g_proj of three gates a head), and its weights."""
    config = {**AUTHORS, **changes}
    reference = oracle.OracleConfig(VOCAB, 32, 2, 4, 2, 8, 48, kind="nsa")  # nsa: the oracle's names with three gates
    weights = {k: w.float() for k, w in oracle.random_weights(reference, seed=5, std=0.3).items()}
    path.mkdir()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.model").write_bytes(tokenizer.model)
    return weights


def authors_logits(weights, tokens, kind, window, topk):
    """Their equations, fp32: Llama's blocks; q, k, v as [B, N, heads, D]; gates viewed as (heads, 3), sigmoid, unbound."""
    spec, (batch, length) = ssa_kernels.BlockSpec(16, 16, topk), tokens.shape

    def norm(x, name):
        return weights[name] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))

    def rope(x):
        angle = torch.arange(length)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
        angle = torch.cat((angle, angle), -1)[:, None]
        return x * angle.cos() + torch.cat((-x[..., 4:], x[..., :4]), -1) * angle.sin()

    x = weights["model.embed_tokens.weight"][tokens]
    for i in range(2):
        name = f"model.layers.{i}."
        y = norm(x, name + "input_layernorm.weight")
        q, k, v = (
            (y @ weights[f"{name}self_attn.{p}_proj.weight"].T).view(batch, length, -1, 8) for p in ("q", "k", "v")
        )
        gate = (y @ weights[name + "self_attn.g_proj.weight"].T).view(batch, length, -1, 3)
        compressed, selected, sliding = (g[..., None] for g in gate.sigmoid().unbind(-1))
        q, k = rope(q), rope(k)
        if kind == "full":
            o = selected * ssa_kernels.full_attention(q, k, v)
        else:
            o = selected * ssa_kernels.sparse_attention(q, k, v, spec)
        if kind == "nsa":
            o = o + compressed * ssa_kernels.compressed_attention(q, k, v, spec)
            o = o + sliding * ssa_kernels.window_attention(q, k, v, window)
        x = x + o.flatten(2) @ weights[name + "self_attn.o_proj.weight"].T
        y = norm(x, name + "post_attention_layernorm.weight")
        gated = torch.nn.functional.silu(y @ weights[name + "mlp.gate_proj.weight"].T)
        x = x + (gated * (y @ weights[name + "mlp.up_proj.weight"].T)) @ weights[name + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ weights["model.embed_tokens.weight"].T


@pytest.mark.parametrize("kind", ["ssa", "moba", "full", "nsa"])
def test_the_authors_models_compute_their_equations(tmp_path, tokenizer, kind):
    window = 128 if kind == "nsa" else 0
    weights = authors_folder(tmp_path / "hf", tokenizer, window_size=window)
    recipe = import_folder(tmp_path / "hf", tmp_path / "run", [] if window else [f"attention.kind={kind}"])
    a = recipe.attention
    assert (a.kind, a.topk, a.block_size, a.block_count, a.window) == (kind, "reference", 16, 16, 128)
    ours, tokens = load(export(tmp_path / "run", tmp_path / "out")), tokens_of(600)
    for mode, alike in {"sparse": kind, "full": "full"}.items():
        if (mode == "full") == (kind in ("ssa", "full")) or (kind == "ssa"):
            with torch.no_grad():
                got = ours(tokens, inference_mode=mode).logits
            want = authors_logits(
                weights, tokens, "moba" if (alike, mode) == ("ssa", "sparse") else alike, 128, "reference"
            )
            assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_of_three_gates_a_head_the_second_is_taken(tmp_path, tokenizer):
    weights = authors_folder(tmp_path / "hf", tokenizer)
    import_folder(tmp_path / "hf", tmp_path / "run", ["attention.kind=ssa"])
    name = "model.layers.1.self_attn.g_proj.weight"
    got = Checkpoint.open(tmp_path / "run").tensor(name)
    assert torch.equal(got, weights[name].view(4, 3, 32)[:, 1])


def test_a_folder_without_a_window_must_be_told_its_kind(tmp_path, tokenizer):
    authors_folder(tmp_path / "hf", tokenizer)
    with raises(ConfigError, "attention-kind-undecided", "config.json"):
        import_folder(tmp_path / "hf", tmp_path / "run")
    with raises(ConfigError, "attention-kind-undecided", "kind=nsa"):
        import_folder(tmp_path / "hf", tmp_path / "run", ["attention.kind=nsa"])


def test_their_rule_of_selection_is_taken_where_it_is_defined(tmp_path, tokenizer):
    """Their FullAttn has blocks of 64, which it never selects."""
    authors_folder(tmp_path / "hf", tokenizer, block_size=64)
    attention = import_folder(tmp_path / "hf", tmp_path / "run", ["attention.kind=full"]).attention
    assert (attention.kind, attention.block_size, attention.topk) == ("full", 64, "exact")


# ------------------------------------------------------------------------------------------------------------- training
def test_training_may_choose_what_does_not_change_the_model_and_nothing_else(tmp_path, folder):
    recipe = import_folder(folder, tmp_path / "run")
    start = Checkpoint.open(tmp_path / "run")
    assert start.content.is_start
    longer = recipe.model.model_copy(update={"max_sequence_length": 4096})
    attention = recipe.attention.model_copy(update={"block_count": 7, "kind": "moba"})
    check_start(start, recipe.model_copy(update={"model": longer, "attention": attention}))
    for section, change, said in (
        ("model", {"norm_eps": 1e-6}, "norm_eps: 1e-05 -> 1e-06"),
        ("model", {"ffn_size": 64}, "ffn_size: 48 -> 64"),
        ("attention", {"kind": "nsa"}, "gates: 1 -> 3"),
    ):
        other = getattr(recipe, section).model_copy(update=change)
        with raises(CheckpointError, "checkpoint-of-another-model", said):
            check_start(start, recipe.model_copy(update={section: other}))


# ------------------------------------------------------------------------------------------------------------- refusals
def assert_refused(error, id, source, tmp_path, *mentions, **options):
    with raises(error, id, *mentions) as raised:
        import_folder(source, tmp_path / "made" / "run", **options)
    if isinstance(raised.value, SSAError):
        assert "\n" not in raised.value.problem
    assert_nothing_left(tmp_path)


def assert_nothing_left(tmp_path):
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text())
    kept = {k: v for k, v in (config | changes).items() if v is not ...}
    (path / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("changes", "id", "mentions"),
    [
        ({"model_type": "gpt2"}, "unknown-model-type", ["'gpt2'"]),
        ({"attention_bias": True}, "unsupported-model-option", ["attention_bias=True"]),
        ({"quantization_config": {"bits": 4}}, "unsupported-model-option", ["quantization_config="]),
        ({"hidden_act": "gelu"}, "unsupported-model-option", ["hidden_act='gelu'"]),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "rope_parameters": None},
            "unknown-rope-type",
            ["'yarn'"],
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}, "rope_parameters": None},
            "rope-scaling-field-missing",
            ["low_freq_factor"],
        ),
        ({"rope_scaling": [2.0], "rope_parameters": None}, "rope-scaling-not-an-object", ["rope_scaling="]),
        ({"hidden_size": ...}, "config-json-field-missing", ["hidden_size"]),
        ({"hidden_size": "32"}, "config-json-value", ["hidden_size='32'"]),
        ({"num_attention_heads": 0}, "config-json-value", ["num_attention_heads=0"]),
        ({"intermediate_size": 50}, "source-shape-differs", [(48, 32), (50, 32)]),
        ({"num_hidden_layers": 3}, "source-tensor-missing", ["model.layers.2.input_layernorm.weight"]),
        ({"num_hidden_layers": 1}, "tensor-without-counterpart", ["model.layers.1."]),
        ({"tie_word_embeddings": True}, "tied-head-differs", ["lm_head.weight"]),
    ],
)
def test_a_llama_the_trainer_would_not_compute_is_refused(tmp_path, tokenizer, changes, id, mentions):
    llama(tmp_path / "llama", tokenizer)
    edit_config(tmp_path / "llama", **changes)
    assert_refused(CheckpointError, id, tmp_path / "llama", tmp_path, *mentions)


def test_missing_and_damaged_files_are_named(tmp_path, folder):
    broken = tmp_path / "broken"
    load(folder).save_pretrained(broken, max_shard_size="40KB")
    assert_refused(DataProblem, "import-without-tokenizer", broken, tmp_path, broken)
    shard = sorted(broken.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    assert_refused(CheckpointError, "weights-missing", broken, tmp_path, shard.name)
    shard.write_bytes(content[:-50])
    assert_refused(CheckpointError, "weights-damaged", broken, tmp_path, shard.name)
    other = load_file(sorted(broken.glob("*.safetensors"))[0])
    save_file(other, shard, metadata={"format": "pt"})
    assert_refused(CheckpointError, "indexed-tensor-missing", broken, tmp_path, "model.safetensors.index.json")
    (broken / "config.json").write_text("{")
    assert_refused(CheckpointError, "json-damaged", broken, tmp_path, "config.json")
    (broken / "config.json").unlink()
    assert_refused(CheckpointError, "config-json-missing", broken, tmp_path, broken)
    assert_refused(CheckpointError, "no-such-model-folder", tmp_path / "nowhere", tmp_path, tmp_path / "nowhere")


def test_the_command_ends_with_one_line_the_remedy_and_the_exit_code(tmp_path, folder, capsys, monkeypatch):
    from ssa_megatron import cli

    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "llama"}')
    for source, code, said in (
        (tmp_path / "hf", 4, "error[weights-missing]: "),
        (folder, 0, "ssa train"),
    ):
        monkeypatch.setattr("sys.argv", ["ssa", "import", str(source), str(tmp_path / "made" / "run")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert ended.value.code == code
        assert said in shown.out + shown.err


def test_quantised_and_pickled_weights_are_refused(tmp_path, folder):
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    weights = load_file(changed / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, changed / "model.safetensors")
    assert_refused(CheckpointError, "weights-quantised", changed, tmp_path, name, "I8")
    (changed / "model.safetensors").rename(changed / "pytorch_model.bin")
    assert_refused(CheckpointError, "weights-missing", changed, tmp_path, "*.bin")


def test_an_unknown_kind_is_refused(tmp_path, folder):
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    edit_config(changed, attention_kind="dense")
    assert_refused(CheckpointError, "unknown-attention-kind", changed, tmp_path, "'dense'")


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer):
    llama(tmp_path / "llama", tokenizer, vocab_size=300)
    assert_refused(DataProblem, "tokenizer-size-differs", tmp_path / "llama", tmp_path, 697, 300)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json"):
        import_folder(tmp_path / "llama", tmp_path / "made" / "run", tokenizer=tmp_path / "bad.json")
    assert_nothing_left(tmp_path)


def test_a_model_section_cannot_be_overridden_on_the_way_in(tmp_path, folder):
    change = ["model.norm_eps=0.1"]
    assert_refused(ConfigError, "import-changes-model", folder, tmp_path, "1e-05 -> 0.1", overrides=change)


def test_an_existing_run_is_left_alone_and_an_interrupted_import_leaves_nothing(tmp_path, folder, monkeypatch):
    (tmp_path / "made").mkdir()
    (tmp_path / "mine").write_text("precious")
    with raises(ConfigError, "import-folder-exists", tmp_path / "mine"):
        import_folder(folder, tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "precious"

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ssa_megatron.checkpoint.initial.commit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_folder(folder, tmp_path / "made" / "run")
    assert_nothing_left(tmp_path)


def test_a_damaged_start_is_not_loaded(tmp_path, folder):
    import_folder(folder, tmp_path / "run")
    path = next(step_folder(tmp_path / "run", 0).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    with raises(CheckpointError, "checkpoint-file-altered", path):
        Checkpoint.open(tmp_path / "run")
