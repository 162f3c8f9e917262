"""The referee's own sanity: each test names a property of the method that a wrong model would break. All in fp64."""

import dataclasses
import math

import pytest
import torch

from . import model as oracle

BASE = oracle.OracleConfig(
    vocab_size=53,
    hidden_size=24,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    ffn_size=40,
    block_size=4,
    block_count=3,
    window=5,
)
CASES = [("ssa", "full"), ("ssa", "sparse"), ("full", "full"), ("moba", "full"), ("nsa", "full")]
LENGTHS = (23, 1, 17, 7)  # documents of one packed row: with a partial block, of one token, and under two blocks


def make(kind="ssa", seed=0, **changes):
    config = dataclasses.replace(BASE, kind=kind, **changes)
    return config, oracle.random_weights(config, seed, std=0.3)


def make_tokens(*shape, seed=1):
    return torch.randint(BASE.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def starts_of(*lengths):
    starts, first = [], 0
    for length in lengths:
        starts += [first] * length
        first += length
    return torch.tensor([starts], dtype=torch.int32)


def random_qkv(n, heads=4, kv_heads=2, dim=8, seed=2, scale=1.5):
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(n, h, dim, generator=generator, dtype=torch.float64) for h in (heads, kv_heads, kv_heads)
    ]


def gradients(loss, weights):
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values()), materialize_grads=True), strict=True))


@pytest.mark.parametrize(("kind", "trunk"), CASES)
def test_no_token_reads_the_future(kind, trunk):
    config, weights = make(kind)
    tokens, starts = make_tokens(1, 40), starts_of(40)
    before = oracle.logits(weights, config, tokens, starts, trunk)
    for t in (3, 4, 18, 39):  # inside a block, at a block's first token, and the last token
        changed = tokens.clone()
        changed[0, t:] = (changed[0, t:] + 1) % config.vocab_size
        after = oracle.logits(weights, config, changed, starts, trunk)
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-11)
        assert (after[:, t:] - before[:, t:]).abs().amax(-1).min() > 1e-6


@pytest.mark.parametrize(("kind", "trunk"), CASES)
def test_a_packed_document_equals_the_document_alone(kind, trunk):
    config, weights = make(kind, seed=3)
    tokens, starts = make_tokens(1, sum(LENGTHS)), starts_of(*LENGTHS)
    packed = oracle.logits(weights, config, tokens, starts, trunk)
    ce, alignment = oracle.losses(weights, config, tokens, starts, trunk)
    ce_sum = alignment_sum = first = 0
    for length in LENGTHS:
        part = tokens[:, first : first + length]
        alone = oracle.logits(weights, config, part, starts_of(length), trunk)
        torch.testing.assert_close(packed[:, first : first + length], alone, rtol=0, atol=1e-11)
        ce_alone, alignment_alone = oracle.losses(weights, config, part, starts_of(length), trunk)
        ce_sum, alignment_sum = ce_sum + (length - 1) * ce_alone, alignment_sum + length * alignment_alone
        first += length
    torch.testing.assert_close(ce, ce_sum / sum(length - 1 for length in LENGTHS))
    torch.testing.assert_close(alignment, torch.as_tensor(alignment_sum / sum(LENGTHS), dtype=ce.dtype))
    merged = oracle.logits(weights, config, tokens, starts_of(sum(LENGTHS)), trunk)
    assert (merged - packed)[:, LENGTHS[0] + 1 :].abs().max() > 1e-3  # the boundaries do matter


def test_cross_entropy_by_hand():
    config, weights = make("full")
    tokens, starts = make_tokens(2, 9), torch.cat([starts_of(4, 5), starts_of(9)])
    scores = oracle.logits(weights, config, tokens, starts)
    terms = []
    for row, t in [(0, t) for t in (0, 1, 2, 4, 5, 6, 7)] + [(1, t) for t in range(8)]:
        terms.append(torch.logsumexp(scores[row, t], 0) - scores[row, t, tokens[row, t + 1]])
    torch.testing.assert_close(oracle.losses(weights, config, tokens, starts)[0], torch.stack(terms).mean())


def test_a_budget_of_everything_makes_sparse_equal_full():
    tokens, starts = make_tokens(2, 32), starts_of(32).repeat(2, 1)
    results = []
    for trunk in oracle.TRUNKS:
        config, weights = make(block_count=8)
        weights = {name: value.requires_grad_() for name, value in weights.items()}
        ce, alignment = oracle.losses(weights, config, tokens, starts, trunk)
        assert alignment < 1e-25
        results.append(gradients(ce + config.alignment_weight * alignment, weights))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=1e-11)
    config, weights = make(block_count=7)
    assert oracle.losses(weights, config, tokens, starts)[1] > 1e-8  # one block fewer is already not everything


def test_alignment_value_and_gradients_on_the_gated_outputs():
    q, k, v = random_qkv(37)
    v = 4 * v  # so that some differences pass 1 and the clip is at work
    gate = torch.rand(37, 4, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()
    o_full, o_sparse = oracle.full_stream(q, k, v), oracle.sparse_stream(q, k, v, BASE)
    full, sparse = gate * o_full, gate * o_sparse
    loss = oracle.alignment_of(full, sparse)
    difference = (full - sparse).detach()
    size = difference.abs()
    assert (size > 1).any()
    assert ((size > 0) & (size < 1)).any()
    value = sum(0.5 * x * x if x < 1 else x - 0.5 for x in size.flatten().tolist())
    assert math.isclose(loss.item(), 2 * value / size.numel(), rel_tol=1e-12)
    d_full, d_sparse, d_gate = torch.autograd.grad(loss, [full, sparse, gate])
    torch.testing.assert_close(d_full, difference.clip(-1, 1) / size.numel())
    torch.testing.assert_close(d_sparse, -d_full)
    torch.testing.assert_close(d_gate, (d_full * o_full + d_sparse * o_sparse).sum(-1, keepdim=True))


def test_routing_against_loops():
    n, b, budget, group = 26, BASE.block_size, BASE.block_count, 2
    q, k, _ = random_qkv(n)
    selected = oracle.select_blocks(q, k, BASE)
    for head in range(2):
        for t in range(n):
            complete = [j for j in range(n // b) if (j + 1) * b <= t + 1]
            score = dict.fromkeys(complete, 0.0)
            for h in range(head * group, (head + 1) * group):
                e = {j: math.exp(float(q[t, h] @ k[j * b : (j + 1) * b, head].mean(0)) / 8**0.5) for j in complete}
                for j in complete:
                    score[j] += e[j] / sum(e.values())
            best = sorted((j for j in complete if j < t // b), key=lambda j: (-score[j], j))[: budget - 1]
            assert selected[head, t].nonzero().flatten().tolist() == sorted([*best, t // b])


def test_ties_go_to_the_lower_block():
    q, k, _ = random_qkv(30)
    selected = oracle.select_blocks(q, torch.zeros_like(k), BASE)
    for t in range(30):
        own = t // BASE.block_size
        assert selected[0, t].nonzero().flatten().tolist() == [*range(min(own, BASE.block_count - 1)), own]
    scores = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.3, 0.9, 0.9]).expand(1, 30, 7)
    selected = oracle.select_from_scores(scores, 30, BASE)
    assert selected[0, 23].nonzero().flatten().tolist() == [1, 3, 5]  # block 5 is the own one, 4 ties and is higher


def test_sparse_error_is_within_the_dropped_mass():
    q, k, v = random_qkv(48, seed=5)
    full, sparse = oracle.full_stream(q, k, v), oracle.sparse_stream(q, k, v, BASE)
    scores = torch.einsum("qhd,khd->hqk", q, oracle.repeat_heads(k, 4)) * 8**-0.5
    mass = oracle.masked_softmax(scores, oracle.causal_mask(48, q.device).expand_as(scores))
    dropped = (mass * ~oracle.sparse_mask(q, k, BASE)).sum(-1).T
    largest = torch.cummax(oracle.repeat_heads(v, 4).norm(dim=-1), dim=0).values
    error = (full - sparse).norm(dim=-1)
    assert (error <= dropped * (largest + sparse.norm(dim=-1)) + 1e-12).all()
    assert dropped.max() > 0.1


def test_nsa_streams_at_single_tokens():
    n, dim = 22, 8
    q, k, v = random_qkv(n)
    compressed, window = oracle.compressed_stream(q, k, v, BASE), oracle.window_stream(q, k, v, BASE)
    assert (compressed[: BASE.block_size - 1] == 0).all()
    for t in (3, 4, 6, 7, 21):
        for h in range(4):
            blocks = [slice(j, j + 4) for j in range(0, t + 1, 4) if j + 4 <= t + 1]
            keys = torch.stack([k[s, h // 2].mean(0) for s in blocks])
            values = torch.stack([v[s, h // 2].mean(0) for s in blocks])
            torch.testing.assert_close(compressed[t, h], torch.softmax(keys @ q[t, h] / dim**0.5, 0) @ values)
            seen = slice(max(0, t - BASE.window + 1), t + 1)
            expected = torch.softmax(k[seen, h // 2] @ q[t, h] / dim**0.5, 0) @ v[seen, h // 2]
            torch.testing.assert_close(window[t, h], expected)


def test_nsa_gate_rows_are_head_major():
    config, weights = make("nsa", num_layers=1)
    starts = starts_of(20)
    prefix = "model.layers.0.self_attn"
    x = torch.randn(1, 20, config.hidden_size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    x[..., 0] = 1.0  # a constant feature lets one weight shut one gate
    rows = torch.full((12, config.hidden_size), 0.0, dtype=torch.float64)
    rows[:, 0] = -1e4
    rows[3 * 2 + 2, 0] = 1e4  # head 2, window
    weights[f"{prefix}.g_proj.weight"] = rows
    weights[f"{prefix}.o_proj.weight"] = torch.eye(32, dtype=torch.float64)[: config.hidden_size]
    output, _ = oracle.attention(weights, prefix, x, starts, config, "full")
    q, k, v = ((x[0] @ weights[f"{prefix}.{name}_proj.weight"].T).reshape(20, -1, 8) for name in ("q", "k", "v"))
    q, k = oracle.rope(q, config.rope_theta), oracle.rope(k, config.rope_theta)
    torch.testing.assert_close(output[0, :, 16:24], oracle.window_stream(q, k, v, config)[:, 2])
    assert (output[..., :16] == 0).all()


def test_rope_is_the_half_rotation():
    x = torch.zeros(6, 1, 8, dtype=torch.float64)
    x[:, 0, 1] = 1.0
    angle = torch.arange(6, dtype=torch.float64) * 500000.0 ** (-2 / 8)
    expected = torch.zeros_like(x)
    expected[:, 0, 1], expected[:, 0, 5] = angle.cos(), angle.sin()
    torch.testing.assert_close(oracle.rope(x, 500000.0), expected)


@pytest.mark.parametrize(("kind", "trunk"), CASES)
def test_gradients_against_finite_differences(kind, trunk):
    """Of the cross-entropy: the alignment's stop-gradients are by design not the derivative of its value."""
    config, weights = make(kind, seed=7, tied=kind != "moba")
    tokens, starts = make_tokens(1, sum(LENGTHS)), starts_of(*LENGTHS)
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    ce, alignment = oracle.losses(weights, config, tokens, starts, trunk)
    assert ce.dtype == alignment.dtype == torch.float64
    assert (alignment > 0) == (kind == "ssa")
    grads = gradients(ce, weights)
    generator, step = torch.Generator().manual_seed(8), 1e-6
    for name, grad in grads.items():
        assert grad.abs().max() > 0, name
        direction = torch.randn(grad.shape, generator=generator, dtype=grad.dtype)
        with torch.no_grad():
            ends = [
                oracle.losses({**weights, name: weights[name] + s * direction}, config, tokens, starts, trunk)[0]
                for s in (step, -step)
            ]
        numeric = (ends[0] - ends[1]).item() / (2 * step)
        assert math.isclose(numeric, (grad * direction).sum().item(), rel_tol=1e-5, abs_tol=1e-7), name


def test_alignment_reaches_every_attention_weight_of_its_layer():
    config, weights = make(num_layers=1)
    weights = {name: value.requires_grad_() for name, value in weights.items()}
    grads = gradients(oracle.losses(weights, config, make_tokens(1, 40), starts_of(40))[1], weights)
    touched = {name.split(".")[-2] for name, grad in grads.items() if grad.abs().max() > 0}
    assert touched == {"embed_tokens", "input_layernorm", "q_proj", "k_proj", "v_proj", "g_proj"}


def test_names_shapes_and_one_seed_in_two_dtypes():
    config, weights = make("nsa", tied=False)
    assert len(weights) == 1 + 10 * config.num_layers + 2
    assert weights["model.layers.1.self_attn.g_proj.weight"].shape == (12, 24)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (16, 24)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (24, 40)
    assert "lm_head.weight" not in make()[1]
    single = oracle.random_weights(config, 0, std=0.3, dtype=torch.float32)
    assert all(torch.equal(single[name], value.float()) for name, value in weights.items())
    tokens, starts = make_tokens(1, 30), starts_of(30)
    low, high = (oracle.total_loss(w, config, tokens, starts) for w in (single, weights))
    assert low.dtype == torch.float32
    assert math.isclose(low.item(), high.item(), rel_tol=1e-4)


def test_doc_starts_that_describe_no_documents_are_refused():
    config, weights = make("full")
    with pytest.raises(ValueError, match=r"doc_starts\[2\]"):
        oracle.losses(weights, config, make_tokens(1, 4), torch.tensor([[0, 0, 1, 1]], dtype=torch.int32))
