"""The needle is where it should be, a model that cannot see it scores exactly chance, and cached scores are the model's own."""

import pytest
import torch

from ssa_megatron.errors import ConfigError, DataProblem
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.needle import _ask, build, needle
from ssa_megatron.evaluation.text import encode
from tests.errors import raises

from .retrieval import trained


@pytest.fixture(scope="module")
def stream(tokenizer, body):
    return [token for document in body.documents for token in tokenizer.encode([document])[0]]


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_prompts_hold_the_fact_at_its_depth_and_end_with_the_question(tiny, stream, depth):
    samples = build(tiny.tokenizer, stream, 200, depth, "0 0", 8)
    texts = [tiny.tokenizer.decode(sample.prompt[1:]) for sample in samples]
    answers = [tiny.tokenizer.decode(sample.candidates[0]) for sample in samples]
    assert len(set(answers)) == 8
    for sample, text, answer in zip(samples, texts, answers, strict=True):
        assert len(sample.prompt) == 200
        assert sample.prompt[0] == tiny.tokenizer.bos_token_id
        question = text[text.rindex("\nThe secret word of") :]
        assert f"{question}{answer}.\n" in text
        assert text.count("The secret word of") == 2
        assert {tiny.tokenizer.decode(c) for c in sample.candidates} == set(answers)
        before = len(encode(tiny.tokenizer, text[: text.index(f"{question}{answer}")]))
        after = 200 - 1 - before - len(encode(tiny.tokenizer, f"{question}{answer}.\n{question}"))
        assert after / (before + after) == pytest.approx(1 - depth, abs=0.06)
    tails = {text[text.index(f"{answer}.\n") + len(answer) :] for text, answer in zip(texts, answers, strict=True)}
    assert len(tails) == 1  # from the fact on all prompts are the same


def test_depths_and_contexts_ask_the_same_questions(tiny, stream):
    one, other = build(tiny.tokenizer, stream, 150, 0.5, "0 1", 8), build(tiny.tokenizer, stream, 260, 0.0, "0 1", 8)
    assert [s.candidates for s in one] == [s.candidates for s in other]
    assert build(tiny.tokenizer, stream, 150, 0.5, "0 1", 8) == one
    assert build(tiny.tokenizer, stream, 150, 0.5, "1 1", 8) != one


def test_a_model_that_sees_its_own_block_alone_scores_exactly_chance(tiny, body):
    tiny.model.set_attention(block_count=1)
    found = needle(tiny, body, Settings(lengths=(160, 224), depths=(0.0, 0.5), haystacks=2))
    blind = [cell for cell in found["cells"] if cell["mode"] == "sparse"]
    assert len(blind) == 4
    for cell in blind:
        assert cell["samples"] == 16
        assert cell["ranked"] == found["chance"] == 1 / 8
        assert cell["margin"] == pytest.approx(0, abs=1e-5)
    seeing = [cell for cell in found["cells"] if cell["mode"] == "full"]
    assert all(abs(cell["margin"]) > 1e-4 for cell in seeing)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_scores_are_those_without_a_cache_and_greedy_is_generate(tiny, stream, mode):
    batch = build(tiny.tokenizer, stream, 130, 0.4, "5", 4)
    # what this model, of random weights, writes by itself is made one of the candidates, so that greedy can be right
    prompts = torch.tensor([sample.prompt for sample in batch])
    with torch.inference_mode():
        written = tiny.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=3, do_sample=False, inference_mode=mode
        )
    written = written[:, 130:].tolist()
    batch[0].candidates[0] = written[0]
    batch[1].candidates[0] = [*written[1][:2], (written[1][2] + 1) % 690]
    found = _ask(tiny.model, batch, mode)
    assert [greedy for _, greedy in found][:2] == [True, False]
    for sample, (scores, greedy), text in zip(batch, found, written, strict=True):
        assert greedy == (text[: len(sample.candidates[0])] == sample.candidates[0])
        for candidate, score in zip(sample.candidates, scores, strict=True):
            with torch.inference_mode():
                logits = tiny.model(
                    torch.tensor([sample.prompt + candidate]), use_cache=False, inference_mode=mode
                ).logits[0, 129:-1]
            want = logits.log_softmax(-1).gather(1, torch.tensor(candidate)[:, None]).sum().item()
            assert score == pytest.approx(want, abs=1e-4)


def test_what_does_not_fit_is_refused_with_a_number_that_does(tiny, stream):
    with raises(ConfigError, "context-without-needle", "--lengths", 20) as raised:
        build(tiny.tokenizer, stream, 20, 0.5, "0", 8)
    enough = int(raised.value.remedy.split()[2])
    assert len(build(tiny.tokenizer, stream, enough, 0.5, "0", 8)[0].prompt) == enough
    with raises(DataProblem, "haystack-too-short", "5,000"):
        build(tiny.tokenizer, stream[:4999], 5000, 0.5, "0", 8)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_model_that_learned_to_look_facts_up_retrieves_them(tmp_path):
    """The other end of the scale from the blind model: what can be retrieved is found to be."""
    one, haystack = trained(tmp_path, steps=400)
    found = needle(one, haystack, Settings(lengths=(48, 64), haystacks=2))
    for cell in found["cells"]:
        assert cell["ranked"] > 0.8, cell
        assert cell["greedy"] > 0.7, cell
        assert cell["margin"] > 3, cell
