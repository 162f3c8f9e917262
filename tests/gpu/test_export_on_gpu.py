"""An exported folder on the GPU: its bundled Triton kernels give what its PyTorch gives, prompts, steps, padding and beams."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from ssa_megatron.hf.export import export
from tests.oracle import model as oracle
from tests.ssa_megatron.hf.conftest import corpus, oracle_config, tiny_recipe, write_run

pytestmark = pytest.mark.gpu
# kinds, query heads, key/value heads: groups of 4, of 1 and all in one
SHAPES = [("ssa", 8, 2), ("moba", 4, 4), ("nsa", 8, 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from ssa_pipelines import train_tokenizer

    home, made = tmp_path_factory.mktemp("export"), {}
    tokenizer = train_tokenizer(iter([corpus()]), home / "t.model", vocab_size=697)

    def get(kind, heads, kv_heads, head_dim=64):
        key = f"{kind}-{heads}-{kv_heads}-{head_dim}"
        if key not in made:
            sizes = {"hidden_size": 128, "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
            recipe = tiny_recipe(kind, max_sequence_length=4096, **sizes)
            weights = oracle.random_weights(oracle_config(recipe), seed=7, std=0.1)
            made[key] = export(write_run(home / key, recipe, weights, tokenizer), home / f"out-{key}")
        return made[key]

    return get


def load(folder, dtype=torch.float32, backend="auto"):
    options = {"trust_remote_code": True, "dtype": dtype, "inference_mode": "sparse", "sparse_backend": backend}
    return AutoModelForCausalLM.from_pretrained(folder, **options).to("cuda").eval()


def tokens_of(length, rows=1):
    return torch.randint(3, 690, (rows, length), generator=torch.Generator().manual_seed(length)).cuda()


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_of_a_padded_batch_are_pytorchs_and_the_kernels_ran(folder, shape, dtype, head_dim, monkeypatch):
    path = folder(*shape, head_dim)
    model, plain = load(path, dtype), load(path, torch.float32, backend="torch")
    same = load(path, dtype, backend="torch")
    code, ran = sys.modules[type(model).__module__], []
    serves, scores, attend = code.bundled_kernels()
    kernels = (serves, scores, lambda *given: ran.append(1) or attend(*given))
    monkeypatch.setattr(code, "bundled_kernels", lambda: kernels)
    tokens, mask = tokens_of(700, 2), torch.ones(2, 700, dtype=torch.long, device="cuda")
    mask[1, :123] = 0
    with torch.no_grad():
        got = model(tokens, attention_mask=mask, use_cache=False).logits.float()
        assert len(ran) == model.config.num_hidden_layers
        want, theirs = (x(tokens, attention_mask=mask, use_cache=False).logits.float() for x in (plain, same))
    assert len(ran) == model.config.num_hidden_layers
    real = mask.bool()
    # a rounded score may choose another block, which moves a token's logits: most tokens must agree, not each
    ours, theirs = (((x - want)[real].norm(dim=-1) / want[real].norm(dim=-1)).sort().values for x in (got, theirs))
    assert ours.isfinite().all()
    if dtype == torch.float32:
        assert ours[int(0.98 * len(ours))] < 1e-3
    else:  # half precision: no further from fp32 than PyTorch in the same precision, which is itself near
        assert ours.median() < 1.2 * theirs.median() < 0.06


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generated_tokens_are_pytorchs(folder, shape, options):
    path = folder(*shape)
    tokens, mask = tokens_of(300, 2), torch.ones(2, 300, dtype=torch.long, device="cuda")
    mask[1, :77] = 0
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": -1, **options}
    got, want = (load(path, backend=b).generate(tokens, attention_mask=mask, **options) for b in ("auto", "torch"))
    assert got.tolist() == want.tolist()


def test_with_gradients_pytorch_serves_and_they_arrive(folder):
    model = load(folder("moba", 4, 4))
    model(tokens_of(300), labels=tokens_of(300)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
