"""The parser of SentencePiece files agrees with the library, and models that cannot be converted exactly are refused."""

from pathlib import Path

import pytest
import sentencepiece

from ssa_pipelines import TokenizerError
from ssa_pipelines.tokenizer.sentencepiece_model import SentencePieceModel, fields
from tests.errors import raises


def test_the_parser_agrees_with_sentencepiece_about_every_piece(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    model = SentencePieceModel(tokenizer.model, tokenizer.path)
    assert len(model.pieces) == processor.vocab_size()
    for i, (text, score, kind) in enumerate(model.pieces):
        assert text == processor.id_to_piece(i)
        assert score == processor.get_score(i)
        found = processor.is_byte(i), processor.is_control(i), processor.is_unknown(i)
        assert (kind == 6, kind == 3, kind == 2) == found
    assert [model.trainer[f"{name}_id"] for name in ("unk", "bos", "eos", "pad")] == [0, 1, 2, -1]
    assert model.normalizer["add_dummy_prefix"] == 0
    assert model.obstacle == ""


def train(path: Path, documents, **options) -> SentencePieceModel:
    lines = [line for text in documents for line in text.split("\n") if line.strip()]
    settings = {"vocab_size": 600, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2, "num_threads": 1}
    settings |= {"normalization_rule_name": "identity", "add_dummy_prefix": False, "remove_extra_whitespaces": False}
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=file, **(settings | options)
        )
    return SentencePieceModel(path.read_bytes(), path)


@pytest.mark.parametrize(
    ("options", "mention"),
    [
        ({"model_type": "unigram"}, "BPE"),
        ({"byte_fallback": False}, "bytes"),
        ({"add_dummy_prefix": True}, "dummy prefix"),
        ({"normalization_rule_name": "nfkc"}, "normalises"),
        ({"remove_extra_whitespaces": True}, "drops spaces"),
        ({"treat_whitespace_as_suffix": True}, "front of pieces"),
        ({"eos_id": -1}, "eos"),
    ],
)
def test_a_model_that_cannot_be_converted_exactly_is_refused(tmp_path, documents, options, mention):
    model = train(tmp_path / "m.model", documents[:40], **options)
    with raises(TokenizerError, "tokenizer-not-convertible", tmp_path / "m.model", mention):
        model.to_hugging_face()


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x0a\xff\xff\xff\xff\x0f", b"\x08" * 50])
def test_bytes_that_are_not_a_model_are_refused(content):
    with raises(TokenizerError, "sentencepiece-model-damaged", "m.model"):
        SentencePieceModel(content, "m.model")


def test_protobuf_fields_of_every_wire_type_are_read():
    message = b"\x08\x96\x01" + b"\x11" + bytes(8) + b"\x1a\x02hi" + b"\x25" + bytes(4)
    assert list(fields(message)) == [(1, 150), (2, bytes(8)), (3, b"hi"), (4, bytes(4))]
