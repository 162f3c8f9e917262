"""The exported model class against the independent oracle: all kinds, both modes, cached, padded, chunked, trained."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

import ssa_kernels
from ssa_megatron.config.sections import RopeScaling
from ssa_megatron.hf.bundle import attention_ssa, cache_ssa, positions_ssa
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from ssa_megatron.model.rope import inverse_frequencies
from tests.oracle import model as oracle

from .models import KINDS, MODES, build, feed, left_padded, tokens_of

LENGTHS = (1, 15, 16, 17, 63, 255, 512)


def expected(weights, reference, tokens, mode):
    """The oracle's logits. It knows trunks of training; a mode that a kind does not train is that of another kind.

    nsa in full mode selects every block; the one-gate kinds in either mode are ssa's two trunks.
    """
    if reference.kind == "nsa":
        reference = reference if mode == "sparse" else dataclasses.replace(reference, block_count=10**6)
    else:
        reference = dataclasses.replace(reference, kind="ssa")
    return oracle.logits(weights, reference, tokens, torch.zeros_like(tokens), mode)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_oracle_at_every_length_in_both_modes(kind, tied):
    model, reference, weights = build(kind, tied=tied)
    for length in LENGTHS:
        tokens = tokens_of(length)
        for mode in MODES:
            with torch.no_grad():
                got = model(tokens, inference_mode=mode).logits
            want = expected(weights, reference, tokens, mode)
            assert (got - want).abs().max() < 1e-10, (length, mode)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_logits_are_within_1e5_of_the_fp64_oracle(kind):
    model, reference, weights = build(kind, dtype=torch.float32, std=0.1)
    for length in LENGTHS:
        tokens = tokens_of(length)
        for mode in MODES:
            with torch.no_grad():
                got = model(tokens, inference_mode=mode).logits
            assert (got - expected(weights, reference, tokens, mode)).abs().max() < 1e-5, (length, mode)


@pytest.mark.parametrize("heads", [(4, 4), (5, 1)])
def test_any_number_of_heads_per_group_agrees(heads):
    for kind in ("nsa", "ssa"):
        model, reference, weights = build(kind, heads=heads, block_size=7, block_count=3, window=11)
        tokens = tokens_of(101, rows=2)
        with torch.no_grad():
            got = model(tokens, inference_mode="sparse").logits
        assert (got - expected(weights, reference, tokens, "sparse")).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_default_mode_is_the_one_the_kind_trains_in(kind):
    model, reference, weights = build(kind)
    tokens = tokens_of(90)
    mode = "sparse" if kind in ("moba", "nsa") else "full"
    with torch.no_grad():
        assert (model(tokens).logits - expected(weights, reference, tokens, mode)).abs().max() < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_enough_blocks_make_sparse_equal_full_and_one_block_fewer_does_not(kind):
    model, _, _ = build(kind)
    tokens = tokens_of(160)
    with torch.no_grad():
        full = model(tokens, inference_mode="full").logits
        assert torch.equal(model(tokens, inference_mode="sparse", block_count=10).logits, full)
        assert torch.equal(model(tokens, inference_mode="sparse", block_count=500).logits, full)
        assert (model(tokens, inference_mode="sparse", block_count=9).logits - full).abs().max() > 1e-6


def test_set_attention_changes_what_a_plain_call_runs():
    model, reference, weights = build("ssa")
    tokens = tokens_of(150)
    model.set_attention(inference_mode="sparse", block_count=2)
    want = expected(weights, dataclasses.replace(reference, block_count=2), tokens, "sparse")
    with torch.no_grad():
        assert (model(tokens).logits - want).abs().max() < 1e-10


# ------------------------------------------------------------------------------------------------ routing and positions
@torch.no_grad()
@pytest.mark.parametrize("topk", ["exact", "reference"])
def test_selection_is_that_of_the_training_kernels(topk):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, 700, 6, 8, generator=generator, dtype=torch.float64)
    k = torch.randn(2, 700, 2, 8, generator=generator, dtype=torch.float64)
    spec = ssa_kernels.BlockSpec(16, 16, topk)
    want = ssa_kernels.select_blocks(q, k, spec).sort(-1).values.permute(0, 2, 1, 3)
    config = SSAConfig(head_dim=8, num_attention_heads=6, num_key_value_heads=2, topk=topk)
    scaled = (q * 8**-0.5).view(2, 700, 2, 3, 8).permute(0, 2, 3, 1, 4)
    pooled = cache_ssa.pool_blocks(k.transpose(1, 2), 0, 43, 16, None)
    position = torch.arange(700)[None]
    got = attention_ssa.select_blocks(scaled, pooled, position, config, 16).sort(-1).values
    got = got[..., got.shape[-1] - 16 :] if got.shape[-1] >= 16 else got
    assert torch.equal(got.to(want), want)


@torch.no_grad()
def test_equal_scores_go_to_the_lower_block():
    config = SSAConfig(head_dim=8, num_attention_heads=2, num_key_value_heads=1)
    q, pooled = torch.ones(1, 1, 2, 1, 8), torch.ones(1, 1, 9, 8)
    got = attention_ssa.select_blocks(q, pooled, torch.tensor([[150]]), config, 4)
    assert got.flatten().tolist() == [9, 0, 1, 2]


def test_llama3_scaling_is_the_trainers():
    values = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = SSAConfig(head_dim=32, rope_theta=10000.0, rope_scaling={"rope_type": "llama3", **values})
    frequencies = inverse_frequencies(32, 10000.0, RopeScaling(**values), "cpu")
    assert not torch.equal(frequencies, inverse_frequencies(32, 10000.0, None, "cpu"))
    cos, _ = positions_ssa.rotary_table(torch.tensor([[0, 1, 300]]), config, torch.float32)
    want = (torch.tensor([0.0, 1.0, 300.0])[:, None] * frequencies).cos()
    torch.testing.assert_close(cos[0, 0, :, :16], want, rtol=0, atol=1e-4)  # 300 radians in fp32: 3e-5 of rounding


SCALINGS = {
    "linear": {"factor": 3.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn by hand": {"factor": 4.0, "beta_fast": 20.0, "beta_slow": 2.0, "attention_factor": 1.3, "truncate": False},
}


@torch.no_grad()
@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rope_is_that_of_transformers_and_cached_steps_agree_beyond_the_trained_length(name):
    from transformers.models.llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": name.split()[0], **SCALINGS[name]}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "hidden_size": 64}
    known = {"max_position_embeddings": 64, "rope_theta": 10000.0, "rope_scaling": scaling, **heads}
    config = SSAConfig(**known, num_hidden_layers=1, intermediate_size=32, vocab_size=97, block_count=3)
    position = torch.arange(300)[None]
    want = LlamaRotaryEmbedding(LlamaConfig(**known))(torch.zeros(1, dtype=torch.float32), position)
    got = positions_ssa.rotary_table(position, config, torch.float32)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours[:, 0], theirs, rtol=0, atol=1e-4)  # 300 radians in fp32
    model = SSAForCausalLM(config).double().eval()
    tokens = tokens_of(300)
    whole = model(tokens, inference_mode="sparse").logits
    assert (feed(model, tokens, [250, *[1] * 50], "sparse")[0] - whole).abs().max() < 1e-10


def test_rope_settings_survive_saving_and_loading(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 8192
    for given in (None, scaling):
        SSAConfig(rope_theta=12345.0, rope_scaling=given, attention_kind="moba", block_count=5).save_pretrained(
            tmp_path
        )
        back = SSAConfig.from_pretrained(tmp_path)
        assert (back.rope_theta, back.rope_parameters["rope_theta"]) == (12345.0, 12345.0)
        assert back.rope_parameters["rope_type"] == ("default" if given is None else "llama3")
        assert given is None or back.rope_scaling.items() >= given.items()
        assert (back.attention_kind, back.inference_mode, back.block_count) == ("moba", "sparse", 5)


# ------------------------------------------------------------------------------------------------------------- training
@pytest.mark.parametrize(
    ("kind", "trunk"), [("ssa", "full"), ("ssa", "sparse"), ("full", "full"), ("moba", "sparse"), ("nsa", "sparse")]
)
def test_training_loss_and_every_gradient_are_the_oracles(kind, trunk, monkeypatch):
    monkeypatch.setattr(attention_ssa, "CHUNK_ELEMENTS", 1 << 18)  # several chunks, each recomputed in backward
    model, reference, weights = build(kind, tied=kind != "moba", block_count=3)
    model.train()
    tokens = tokens_of(120, rows=2)
    weights = {name: weight.requires_grad_() for name, weight in weights.items()}
    want = oracle.total_loss(weights, reference, tokens, torch.zeros_like(tokens), trunk)
    want.backward()
    output = model(tokens, labels=tokens, trunk=trunk)
    output.loss.backward()
    assert abs(output.loss.item() - want.item()) < 1e-10
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert gradients.keys() == weights.keys()
    for name, weight in weights.items():
        assert (gradients[name] - weight.grad).norm() < 1e-10 * weight.grad.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["ssa", "nsa"])
def test_gradient_checkpointing_changes_no_gradient_and_drops_the_cache(kind, reentrant):
    model, _, _ = build(kind, block_count=3)
    model.train()
    tokens, gradients = tokens_of(70, rows=2), []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        output = model(tokens, labels=tokens, trunk="sparse", past_key_values=DynamicCache(), use_cache=checkpointed)
        output.loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    assert output.past_key_values is None
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).norm() <= 1e-12 * gradient.norm(), name


def test_ssa_in_training_draws_its_trunk_as_often_as_the_config_says():
    model, _, _ = build("ssa", block_count=1)
    tokens, drawn = tokens_of(60), []
    with torch.no_grad():
        known = {trunk: model.train()(tokens, labels=tokens, trunk=trunk).loss.item() for trunk in MODES}
        for probability in (0.25, 0.0, 1.0):
            model.config.sparse_probability = probability
            torch.manual_seed(0)
            losses = [model(tokens, labels=tokens).loss.item() for _ in range(60)]
            assert set(losses) <= set(known.values())
            drawn.append(losses.count(known["sparse"]) / 60)
        assert model.eval()(tokens, labels=tokens).loss.item() == model(tokens, labels=tokens).loss.item()
    assert 0.1 < drawn[0] < 0.4
    assert drawn[1:] == [0.0, 1.0]


def test_loss_in_evaluation_is_cross_entropy_alone_and_skips_padding():
    model, reference, weights = build("ssa")
    tokens = tokens_of(60)
    want, _ = oracle.losses(weights, reference, tokens, torch.zeros_like(tokens))
    padded = torch.cat((torch.zeros(1, 9, dtype=torch.long), tokens), 1)
    mask = (torch.arange(69) >= 9).long()[None]
    with torch.no_grad():
        loss = model(padded, attention_mask=mask, labels=padded.masked_fill(mask == 0, -100)).loss
        # position 8, a padding token, would predict the first real one: an ordinary label-shift, and not in the oracle
        first = torch.nn.functional.cross_entropy(model(padded, attention_mask=mask).logits[0, 8:9], padded[0, 9:10])
    assert abs(loss * 60 - first - want * 59) < 1e-9


# ----------------------------------------------------------------------------------------- attention from the outside
class Flat:
    """One layer's attention of an engine that keeps sequences one after the other, as vLLM does: [T, heads * D] in and out."""

    def __init__(self, lengths, dim):
        self.lengths, self.dim = lengths, dim

    def forward(self, q, k, v, scale):
        parts = []
        for one in zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True):
            one = [x.unflatten(-1, (-1, self.dim)).transpose(0, 1) for x in one]
            one[1:] = (x.repeat_interleave(one[0].shape[0] // x.shape[0], 0) for x in one[1:])
            out = torch.nn.functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale)
            parts.append(out.transpose(0, 1).flatten(1))
        return torch.cat(parts)


def flat_attention(module, query, key, value, attention_mask, scaling, attention_instances, **_):
    assert module.is_causal
    assert attention_mask is None
    flat = (x.transpose(1, 2).reshape(x.shape[2], -1) for x in (query, key, value))
    return attention_instances[module.layer_idx].forward(*flat, scaling), None


@torch.no_grad()
def test_an_engine_may_run_the_full_stream_through_transformers_interface():
    from transformers import AttentionInterface

    AttentionInterface.register("flat", flat_attention)
    model, _, _ = build("ssa")
    rows = [tokens_of(length)[0] for length in (70, 31, 1)]
    want = torch.cat([model(row[None], inference_mode="full").logits[0] for row in rows])
    model.config._attn_implementation = "flat"
    instances = {i: Flat([len(row) for row in rows], 8) for i in range(2)}
    position = torch.cat([torch.arange(len(row)) for row in rows])[None]
    options = {"position_ids": position, "use_cache": False, "attention_instances": instances}
    got = model(torch.cat(rows)[None], return_dict=False, **options)[0][0]
    assert (got - want).abs().max() < 1e-10
    for refused in ({"inference_mode": "sparse"}, {"use_cache": True}):
        with pytest.raises(ValueError, match="attn_implementation='flat' runs full mode only"):
            model(torch.cat(rows)[None], **(options | refused))


# ------------------------------------------------------------------------------------------------------------- refusals
def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="attention_kind='dense'"):
        SSAConfig(attention_kind="dense")
    for scaling, said in (
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type='dynamic'"),
        ({"rope_type": "llama3", "factor": 2.0}, "'llama3' needs low_freq_factor"),
        ({"rope_type": "linear", "factor": 2.0, "mscale": 1.0}, "'linear' has no mscale"),
        ({"factor": 2.0}, "no rope_type"),
    ):
        with pytest.raises(ValueError, match=said):
            SSAConfig(rope_scaling=scaling)
    model, _, _ = build("ssa")
    tokens = tokens_of(20)
    with pytest.raises(ValueError, match="inference_mode='both'"):
        model(tokens, inference_mode="both")
    with pytest.raises(ValueError, match="block_count=0"):
        model(tokens, block_count=0)
    with pytest.raises(ValueError, match="contradict"):
        model(tokens, trunk="full", inference_mode="sparse")
    with pytest.raises(ValueError, match="hole"):
        model(tokens, attention_mask=(torch.arange(20) != 7).long()[None])
    with pytest.raises(ValueError, match="covers 19 tokens"):
        model(tokens, attention_mask=torch.ones(1, 19))
    with pytest.raises(ValueError, match="DynamicCache"):
        model(tokens, past_key_values=((None, None),), use_cache=True)
    packed = torch.cat((torch.arange(12), torch.arange(8)))[None]
    for positions in (packed, torch.zeros_like(packed)):  # the second: sequences of one token each
        with pytest.raises(ValueError, match="begin anew inside a row"):
            model(tokens, position_ids=positions)


def test_positions_of_one_sequence_a_row_are_taken_padding_and_a_cache_included():
    """transformers writes 0 or 1 where padding is, on either side; a model of packed rows alone is refused."""
    model, _, _ = build("ssa")
    tokens, mask = left_padded([tokens_of(40)[0], tokens_of(23)[0]])
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        for order in (slice(None), torch.arange(39, -1, -1)):  # padded on the left, then on the right
            flipped = mask[:, order]
            where = positions if order == slice(None) else (flipped.cumsum(-1) - 1).masked_fill(flipped == 0, 1)
            given = {"attention_mask": flipped, "inference_mode": "sparse", "block_count": 2}
            got = model(tokens, position_ids=where, **given).logits
            assert torch.equal(got[flipped.bool()], model(tokens, **given).logits[flipped.bool()])
        first = model(tokens[:, :30], attention_mask=mask[:, :30], use_cache=True)
        rest = {"attention_mask": mask, "past_key_values": getattr(first, cache_ssa.CACHE), "use_cache": True}
        got = model(tokens[:, 30:], position_ids=positions[:, 30:], **rest).logits
        assert (got - model(tokens, attention_mask=mask).logits[:, 30:]).abs().max() < 1e-10


@pytest.mark.parametrize("name", ["output_hidden_states", "return_dict"])
def test_what_a_config_says_of_the_output_is_what_a_forward_gives(name):
    model, _, _ = build("ssa")
    tokens = tokens_of(20)
    with torch.no_grad():
        if name == "return_dict":
            model.config.return_dict = False
            for got in (model(tokens), model.model(tokens)):
                assert isinstance(got, tuple)
            assert torch.equal(model(tokens)[0], model(tokens, return_dict=True).logits)
        else:
            model.config.output_hidden_states = True
            for one in (model, model.model):
                assert len(one(tokens).hidden_states) == 3
                assert one(tokens, output_hidden_states=False).hidden_states is None
        assert model.generate(tokens, max_new_tokens=3, do_sample=False).shape == (1, 23)
