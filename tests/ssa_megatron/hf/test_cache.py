"""The exported model's cache: pieces, padded rows, generation and beams give what the whole sequence at once gives."""

import pytest
import torch
from transformers import DynamicCache

from ssa_megatron.hf.bundle import attention_ssa, cache_ssa

from .models import KINDS, MODES, build, feed, left_padded, tokens_of

PIECES = ([1] * 70, [21, 1, 1, 37, *[1] * 10], [16, 16, 38], [69, 1])


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_pieces_give_the_logits_of_the_whole_sequence(kind, mode):
    model, _, _ = build(kind, block_count=3)
    tokens = tokens_of(70, rows=2)
    want = model(tokens, inference_mode=mode).logits
    for steps in PIECES:
        assert (feed(model, tokens, steps, mode)[0] - want).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_left_padded_row_gives_what_it_gives_alone_cached_or_not(kind, mode):
    model, _, _ = build(kind, block_count=3)
    rows = [tokens_of(length)[0] for length in (130, 85, 17, 1)]
    tokens, mask = left_padded(rows)
    whole = model(tokens, attention_mask=mask, inference_mode=mode).logits
    pieces, _ = feed(model, tokens, [100, 1, 9, *[1] * 20], mode, mask)
    assert whole.isfinite().all()
    for i, row in enumerate(rows):
        alone = model(row[None], inference_mode=mode).logits[0]
        assert (whole[i, -len(row) :] - alone).abs().max() < 1e-10
        assert (pieces[i, -len(row) :] - alone).abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_generate_gives_the_same_tokens_with_and_without_cache_alone_and_in_a_batch(kind):
    model, _, _ = build(kind, block_count=3)
    rows = [tokens_of(length)[0] for length in (50, 33, 5)]
    tokens, mask = left_padded(rows)
    for mode in MODES:
        options = {"max_new_tokens": 40, "do_sample": False, "inference_mode": mode, "pad_token_id": 0}
        batch = model.generate(tokens, attention_mask=mask, **options)[:, 50:]
        for i, row in enumerate(rows):
            alone = model.generate(row[None], use_cache=True, **options)[0, len(row) :]
            slow = model.generate(row[None], use_cache=False, **options)[0, len(row) :]
            assert alone.tolist() == slow.tolist() == batch[i].tolist()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_generate_feeds_one_new_token_a_step_whatever_transformers_calls_the_cache(options):
    """transformers 5.24 hands the cache over as `cache`: unheard, every step was a whole prompt, with the same tokens."""
    model = build("ssa")[0]
    fed = []
    model.model.layers[0].register_forward_pre_hook(lambda _, arguments: fed.append(arguments[0].shape[1]))
    made = model.generate(tokens_of(40), max_new_tokens=5, do_sample=False, eos_token_id=-1, **options)
    assert (made.shape[1], fed) == (45, [40, 1, 1, 1, 1])
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens_of(40), cache=cache, use_cache=True)
        assert cache.get_seq_length() == 40
        with pytest.raises(ValueError, match="two names of one argument"):
            model(tokens_of(1), cache=cache, past_key_values=DynamicCache())


@pytest.mark.parametrize("masked", [True, False])
def test_a_prompt_of_embeddings_is_continued_as_its_tokens_are(masked):
    model, tokens = build("ssa")[0], tokens_of(40)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1}
    given = {"attention_mask": torch.ones_like(tokens)} if masked else {}
    made = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), **given, **options)
    assert made.tolist() == model.generate(tokens, **options)[:, 40:].tolist()


def test_a_model_drafts_for_itself_and_every_draft_is_kept():
    """Assisted generation crops the caches of both models after each round."""
    model, tokens = build("ssa", block_count=2)[0], tokens_of(70)
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": -1, "inference_mode": "sparse"}
    plain = model.generate(tokens, **options)
    assert model.generate(tokens, assistant_model=build("ssa", block_count=2)[0], **options).tolist() == plain.tolist()
    assert model.generate(tokens, prompt_lookup_num_tokens=3, **options).tolist() == plain.tolist()


def test_beam_search_reorders_keys_values_and_pooled_keys_together():
    model, _, _ = build("nsa", block_count=3)
    tokens, mask = left_padded([tokens_of(50)[0], tokens_of(31)[0]])
    options = {"max_new_tokens": 24, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(tokens, attention_mask=mask, use_cache=True, **options)
    assert cached.tolist() == model.generate(tokens, attention_mask=mask, use_cache=False, **options).tolist()


@torch.no_grad()
def test_a_cropped_cache_goes_on_as_if_the_cropped_tokens_had_never_been():
    model, _, _ = build("nsa", block_count=3)
    tokens, other = tokens_of(70), tokens_of(71)[:, :30]
    _, cache = feed(model, tokens, [70], "sparse")
    cache.crop(-22)
    changed = torch.cat((tokens[:, :48], other), 1)
    got = model(other, past_key_values=cache, use_cache=True).logits
    assert (got - model(changed).logits[:, 48:]).abs().max() < 1e-10


@torch.no_grad()
def test_switching_the_mode_in_the_middle_of_a_sequence_pools_what_full_mode_did_not():
    model, _, _ = build("ssa", block_count=3)
    tokens = tokens_of(120)
    cache = DynamicCache()
    model(tokens[:, :90], past_key_values=cache, use_cache=True, inference_mode="full")
    got = model(tokens[:, 90:], past_key_values=cache, use_cache=True, inference_mode="sparse").logits
    assert got.shape == (1, 30, 97)
    layer = cache.layers[0]
    pooled = layer.keys[:, :, :112].reshape(1, 2, 7, 16, 8).mean(3)
    assert (layer.pooled[0] - pooled).abs().max() < 1e-12


@torch.no_grad()
def test_a_decoding_step_pools_only_the_block_it_completes(monkeypatch):
    model, _, _ = build("ssa", block_count=3)
    tokens = tokens_of(97)
    _, cache = feed(model, tokens[:, :64], [64], "sparse")
    pooled = []

    def counting(x, first, count, size, start, plain=cache_ssa.pool_blocks):
        pooled.append(count)
        return plain(x, first, count, size, start)

    monkeypatch.setattr(cache_ssa, "pool_blocks", counting)
    for t in range(64, 97):
        model(tokens[:, t : t + 1], past_key_values=cache, use_cache=True, inference_mode="sparse")
    assert pooled == [1] * 4  # two blocks completed in 33 steps, in each of two layers


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_queries_do_not_change_the_logits(kind, monkeypatch):
    model, _, _ = build(kind, window=20)
    tokens, mask = left_padded([tokens_of(150)[0], tokens_of(77)[0]])
    want = [model(tokens, attention_mask=mask, inference_mode=mode).logits for mode in MODES]
    monkeypatch.setattr(attention_ssa, "CHUNK_ELEMENTS", 1 << 14)
    for mode, logits in zip(MODES, want, strict=True):
        assert (model(tokens, attention_mask=mask, inference_mode=mode).logits - logits).abs().max() < 1e-10


@torch.no_grad()
def test_bf16_runs_cached_and_stays_near_fp32():
    model, _, _ = build("nsa", dtype=torch.float32, std=0.05)
    tokens = tokens_of(80)
    want = model(tokens, inference_mode="full").logits
    model = model.to(torch.bfloat16)
    got, _ = feed(model, tokens, [60, *[1] * 20], "full")
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.05 * want.abs().max()
