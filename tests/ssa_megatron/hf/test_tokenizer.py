"""The exported tokenizer against SentencePiece and `ssa_pipelines.Tokenizer`, id for id and character for character."""

import random

import pytest
import sentencepiece
from transformers import AutoTokenizer

import ssa_pipelines
from ssa_megatron.errors import DataProblem
from ssa_megatron.hf.tokenizer_export import PROBES, check_parity, write_tokenizer
from ssa_pipelines import TokenizerError
from tests.errors import raises

from .conftest import corpus

FRAGMENTS = (
    *("a", "b", "ab", "re", "tion", "the", " the", " ", "  ", "    ", "\n", "\n\n", "\t", "\r", "\x00", "0", "1", "42"),
    *("\u2581", "\u00e9", "e\u0301", "\u65e5\u672c", "\U0001f600", "\u200d", "\ufeff", "\u00a0", "\u3000", "\ufffd"),
    *("<s>", "</s>", "<unk>", "<0x0A>", ".", ",", "'", "(", "self", "return", "__"),
)


def texts(count=1500):
    draw, source = random.Random(0), corpus()
    for i in range(count):
        if i % 3 == 0:
            at = draw.randrange(len(source))
            yield source[at : at + draw.randrange(300)]
        elif i % 3 == 1:
            yield "".join(draw.choice(FRAGMENTS) for _ in range(draw.randrange(60)))
        else:
            points = (draw.choice((0x7F, 0x2FF, 0xD7FF, 0x10FFFF)) for _ in range(draw.randrange(20)))
            characters = (draw.randrange(top + 1) for top in points)
            yield "".join(chr(c) for c in characters if not 0xD800 <= c < 0xE000)


@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_tokenizer(tokenizer, folder, max_length=100_000)
    return AutoTokenizer.from_pretrained(folder)


def test_ids_are_those_of_the_training_tokenizer_for_every_text(exported, tokenizer):
    for text in (*PROBES, *texts()):
        ids = exported(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer.encode([text])[0], repr(text)
        assert exported.decode(ids) == text


def test_ids_are_sentencepieces_own_for_every_text_without_its_space_mark(exported, tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    for text in texts():
        if "\u2581" not in text:
            assert exported(text, add_special_tokens=False)["input_ids"] == processor.encode(text), repr(text)


def test_prompts_start_with_bos_and_batches_are_padded_on_the_left_with_eos(exported, tokenizer):
    batch = exported(["a", "a longer prompt"], padding=True)
    short, long = batch["input_ids"]
    assert long == [tokenizer.bos_id, *tokenizer.encode(["a longer prompt"])[0]]
    assert short == [tokenizer.eos_id] * (len(long) - 2) + [tokenizer.bos_id, *tokenizer.encode(["a"])[0]]
    assert batch["attention_mask"][0] == [0] * (len(long) - 2) + [1, 1]
    assert exported.decode(long, skip_special_tokens=True) == "a longer prompt"


def test_a_conversion_that_differs_is_refused(tokenizer, tmp_path):
    other = ssa_pipelines.train_tokenizer(iter([corpus()]), tmp_path / "m.model", vocab_size=600)
    own, foreign = tokenizer.to_hugging_face(), other.to_hugging_face()
    own.encode_special_tokens = foreign.encode_special_tokens = True
    assert check_parity(tokenizer, own) > len(PROBES)
    with raises(DataProblem, "tokenizer-conversion-differs", tokenizer.path):
        check_parity(tokenizer, foreign)


def test_a_tokenizer_that_cannot_be_converted_is_refused(tmp_path):
    unigram = ssa_pipelines.train_tokenizer(
        iter([corpus()]), tmp_path / "m.model", vocab_size=600, model_type="unigram"
    )
    with raises(TokenizerError, "tokenizer-not-convertible", tmp_path / "m.model"):
        write_tokenizer(unigram, tmp_path, max_length=10)
