"""The exported tokenizer against SentencePiece and `ssa_pipelines.Tokenizer`, id for id and character for character."""

import random
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from ssa_megatron.errors import DataProblem
from ssa_megatron.hf.tokenizer_export import PROBES, check_parity, convert, fields, read_model, write_tokenizer
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
    write_tokenizer(tokenizer.path, folder, max_length=100_000)
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


def test_protobuf_reader_agrees_with_sentencepiece_about_every_piece(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    pieces, trainer, normalizer = read_model(tokenizer.path)
    assert len(pieces) == processor.vocab_size()
    for i, (text, score, kind) in enumerate(pieces):
        assert text == processor.id_to_piece(i)
        assert score == processor.get_score(i)
        assert (kind == 6, kind == 3, kind == 2) == (
            processor.is_byte(i),
            processor.is_control(i),
            processor.is_unknown(i),
        )
    assert (trainer["bos_id"], trainer["eos_id"], trainer["pad_id"]) == (1, 2, -1)
    assert normalizer["add_dummy_prefix"] == 0


def train(path: Path, **options):
    sentences = [line for line in corpus().split("\n") if line.strip()]
    settings = {"vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    settings |= {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, **(settings | options)
        )
    return path


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "not BPE"),
        ({"byte_fallback": False}, "not spelt in bytes"),
        ({"add_dummy_prefix": True}, "dummy prefix"),
        ({"normalization_rule_name": "nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "drops spaces"),
        ({"treat_whitespace_as_suffix": True}, "front of pieces"),
        ({"eos_id": -1}, "document marks"),
    ],
)
def test_models_that_cannot_be_converted_exactly_are_refused(tmp_path, options, reason):
    with raises(DataProblem, "tokenizer-not-convertible", reason):
        convert(train(tmp_path / "m.model", **options))


def test_a_conversion_that_differs_is_refused(tokenizer, tmp_path):
    other = convert(train(tmp_path / "m.model", user_defined_symbols=["\n"]))
    with raises(DataProblem, "tokenizer-not-convertible", tokenizer.path):
        check_parity(tokenizer.path, other)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f", b"\x08" * 50])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    path = tmp_path / "m.model"
    path.write_bytes(content)
    with pytest.raises(DataProblem) as refused:
        read_model(path)
    assert refused.value.id in ("not-a-tokenizer", "tokenizer-without-pieces")
    assert str(path) in str(refused.value)
    with raises(DataProblem, "tokenizer-unreadable", "missing.model"):
        read_model(tmp_path / "missing.model")


def test_protobuf_fields_of_every_wire_type_are_read():
    message = b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1a\x02hi" + b"\x25" + bytes(4)
    assert list(fields(message)) == [(1, 150), (2, bytes(8)), (3, b"hi"), (4, bytes(4))]
