"""Attention measured from outside equals the oracle's, brute force, and the model's own streams; Theorem 1 holds."""

import math

import pytest
import torch

from ssa_kernels import BlockSpec
from ssa_kernels.reference import oracle
from ssa_megatron.evaluation.attention_mass import LAGS, _listening, attention, measure, overlap
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.hf.bundle.attention_ssa import full_stream

SPEC = BlockSpec(4, 3)


def drawn(tokens=53, heads=4, kv_heads=2, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim))
    return tuple(2 * torch.randn(shape, generator=generator) for shape in shapes)


def test_mass_entropy_and_error_are_the_oracles():
    q, k, v = drawn()
    got = measure(q, k, v, SPEC)
    one = [x[None].double() for x in (q, k, v)]
    want = oracle.attention_statistics(one[0], one[1], SPEC, 8**-0.5)
    torch.testing.assert_close(got.inside_hn.mean(1), want.sparsity)
    torch.testing.assert_close(got.entropy_hn.mean(1), want.entropy)
    torch.testing.assert_close(got.dropped_hn, 1 - got.inside_hn, atol=1e-12, rtol=0)
    full = oracle.full_attention(*one, 8**-0.5)
    sparse = oracle.sparse_attention(*one, SPEC, 8**-0.5)
    torch.testing.assert_close(got.error_hn.T, (full - sparse)[0].norm(dim=-1), atol=1e-5, rtol=1e-5)
    largest = torch.stack([v[: t + 1].double().norm(dim=-1).amax(0) for t in range(len(v))]).repeat_interleave(2, 1)
    bound = got.dropped_hn.T * (largest + sparse[0].norm(dim=-1))
    torch.testing.assert_close(got.bound_hn.T, bound, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_the_error_never_exceeds_the_bound_and_comes_close_to_it(seed):
    """Nothing less is a bound: values along one line and one key outside make both sides of Theorem 1 meet."""
    got = measure(*drawn(seed=seed), SPEC)
    assert (got.error_hn <= got.bound_hn + 1e-5).all()
    q, k, v = drawn(tokens=13, heads=1, kv_heads=1)
    q, k = (
        torch.zeros_like(q),
        torch.zeros_like(k),
    )  # equal weights and scores: the lower blocks are kept
    v[:] = torch.randn(1, 1, 8, generator=torch.Generator().manual_seed(seed))
    v[8:12] *= -1  # block 2, dropped by the last token, whose blocks are 3, 0 and 1
    got = measure(q, k, v, SPEC)
    assert got.blocks_nks[12, 0].tolist() == [3, 0, 1]
    assert got.error_hn[0, 12] == pytest.approx(got.bound_hn[0, 12].item(), rel=1e-5)


def test_nothing_is_dropped_while_everything_fits():
    got = measure(*drawn(tokens=12), SPEC)
    assert (got.dropped_hn == 0).all()
    assert got.error_hn.max() < 1e-6
    torch.testing.assert_close(got.inside_hn, torch.ones_like(got.inside_hn))


@pytest.mark.parametrize("lag", [1, 5])
def test_overlap_is_what_sets_say(lag):
    blocks = measure(*drawn(), SPEC).blocks_nks
    shares = []
    for t in range(lag, len(blocks)):
        for head in range(2):
            now, before = (set(blocks[i, head].tolist()) - {-1} for i in (t, t - lag))
            if blocks[t - lag, head, 0] >= 3:
                shares.append(len(now & before) / len(now))
    assert overlap(blocks, lag, SPEC) == pytest.approx(sum(shares) / len(shares))
    assert overlap(blocks, 45, SPEC) is None


def test_what_is_heard_of_a_layer_gives_its_output(tiny):
    model, outputs = tiny.model, []
    tokens = torch.randint(3, 690, (1, 50), generator=torch.Generator().manual_seed(1))
    hooks = [
        layer.self_attn.register_forward_hook(lambda m, i, o: outputs.append((m, i[0], o[0])))
        for layer in model.model.layers
    ]
    with torch.no_grad(), _listening(model) as heard:
        model(tokens, inference_mode="full", use_cache=False)
        again = len(heard)
        model(tokens, inference_mode="full", use_cache=False)
    for hook in hooks:
        hook.remove()
    assert (again, len(heard)) == (2, 4)
    for (q, k, v), (layer, x, output) in zip(heard[:2], outputs[:2], strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
        gate = torch.sigmoid(layer.g_proj(x)).transpose(1, 2)[..., None]
        mixed = gate * full_stream(q, k, v, torch.arange(50)[None], None)
        torch.testing.assert_close(layer.o_proj(mixed.transpose(1, 2).flatten(2)), output)
    assert not any(module._forward_hooks for module in model.modules())


def test_the_part_of_a_report(tiny, body):
    found = attention(tiny, body, Settings(sequences=2))
    assert (found["length"], found["sequences"], found["block_count"]) == (128, 2, 3)
    assert len(found["layers"]) == 2
    for layer in found["layers"]:
        assert len(layer["sparsity"]) == len(layer["entropy"]) == 4
        theorem = layer["theorem"]
        assert theorem["tokens"] == 2 * 4 * (128 - 3 * 16)
        assert theorem["violations"] == 0
        assert 0 < theorem["error"] < theorem["bound"]
        assert 0 < layer["overlap"][0] <= 1
        assert len(layer["overlap"]) == len(LAGS)
        assert layer["overlap"][-1] is None  # 128 tokens have no pair 128 apart
    assert sum(one["tokens"] for one in found["bins"]) <= 2 * 2 * 4 * 128
    assert all(one["error"] <= one["bound"] for one in found["bins"])
    assert 1 / 3 < found["chance"] < 1


def test_blocks_that_cover_the_sequence_have_no_theorem_to_show(tiny, body):
    tiny.model.set_attention(block_count=8)
    found = attention(tiny, body, Settings(sequences=1))
    assert [layer["theorem"] for layer in found["layers"]] == [None, None]
    assert found["layers"][0]["sparsity"] == pytest.approx([1.0] * 4)
    assert found["bins"] == []
    assert found["chance"] is None
    assert all(math.isfinite(x) for layer in found["layers"] for x in layer["entropy"])
