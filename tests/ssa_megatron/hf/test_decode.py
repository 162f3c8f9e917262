"""Decoding with the project's kernels gives the tokens and logits of the exported class: cached, padded, every mode."""

import pytest
import torch

from ssa_megatron.errors import ConfigError
from ssa_megatron.hf import bench_generation
from ssa_megatron.hf.decode import Decoder
from tests.errors import raises

from .models import build, left_padded, tokens_of


@pytest.mark.parametrize("mode", ["full", "sparse"])
@pytest.mark.parametrize("kind", ["full", "moba", "ssa"])
def test_prefill_and_steps_give_the_models_logits_row_by_row(kind, mode):
    model, _, _ = build(kind, block_count=3)
    rows = [tokens_of(length)[0] for length in (90, 61, 17)]
    prompts = [row[:-12] for row in rows]
    tokens, _ = left_padded(prompts)
    decoder = Decoder(model, 3, 100, mode=mode)
    got = [decoder.prefill(tokens, [len(p) for p in prompts])]
    got += [decoder.step(torch.stack([row[t] for row in rows])) for t in range(-12, 0)]
    for i, row in enumerate(rows):
        with torch.no_grad():
            want = model(row[None], inference_mode=mode).logits[0, -13:]
        assert (torch.stack([logits[i] for logits in got]) - want).abs().max() < 1e-10
    assert decoder.caches[0].host_lengths == [90, 61, 17]


def test_budget_and_rule_of_selection_are_taken_from_the_call_and_the_config():
    model, _, _ = build("ssa", block_count=16)
    model.config.topk = "reference"
    tokens = tokens_of(600)
    with torch.no_grad():
        want = model(tokens, inference_mode="sparse").logits[:, -1]
        assert (Decoder(model, 1, 600, mode="sparse").prefill(tokens) - want).abs().max() < 1e-10
        model.config.topk = "exact"
        fewer = model(tokens, inference_mode="sparse", block_count=5).logits[:, -1]
    assert (Decoder(model, 1, 600, mode="sparse", block_count=5).prefill(tokens) - fewer).abs().max() < 1e-10
    assert (fewer - want).abs().max() > 1e-3


def test_traffic_is_every_key_in_full_mode_and_pooled_keys_and_chosen_blocks_in_sparse():
    model, _, _ = build("ssa", dtype=torch.bfloat16, block_count=4)
    full, sparse = (Decoder(model, 2, 1024, mode=mode) for mode in ("full", "sparse"))
    one = 2 * 8 * 2 * 2 * 2  # two heads of 8 channels, bf16, two rows, two layers
    assert full.traffic(1024) == one * 2 * 1024
    assert sparse.traffic(1024) == one * (2 * 64 + 2 * 4 * 16)
    assert sparse.traffic(48) == full.traffic(48)
    assert full.cache_bytes == one * (2 * 1024 + 2 * 64)


def test_nsa_is_refused_and_the_benchmark_measures_every_path_in_both_modes():
    with raises(ConfigError, "kind-not-cached", "nsa"):
        Decoder(build("nsa")[0], 1, 10)
    rows = list(bench_generation.rows(bench_generation.random_model("cpu", True), [400], [1], 2, 60))
    assert [(row["path"], row["mode"]) for row in rows] == [
        (path, mode) for path in bench_generation.PATHS for mode in ("full", "sparse")
    ]
    assert len(rows) == 10
    assert all(row["tokens_per_s"] > 0 and ("prompt" in row["path"] or row["cache_gb"] > 0) for row in rows)
    assert rows[1]["read_gb"] < rows[0]["read_gb"]
