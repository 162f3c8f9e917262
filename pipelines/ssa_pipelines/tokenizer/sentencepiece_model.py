"""The contents of a SentencePiece model file, and its conversion to Hugging Face's `tokenizers` with equal ids.

In the converted tokenizer a space stays a space in the pieces, so a literal U+2581 in a text is spelt in bytes, as in
`SentencePieceTokenizer`. It refuses what cannot be converted exactly: unigram, normalisation, dummy prefix, no byte fallback.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ssa_pipelines.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

SPACE_MARK = "\u2581"  # SentencePiece's own mark for a space; in a document it must not turn into one
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type of sentencepiece_model.proto
BPE = 2  # TrainerSpec.ModelType
_TRAINER = {3: "model_type", 24: "suffix", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
_NORMALIZER = {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5: "escape_whitespaces"}


class SentencePieceModel:
    """A parsed model. pieces: (text, score, type). trainer, normalizer: settings by name, with the defaults of the format.

    Raises TokenizerError for bytes that are not a model.
    """

    def __init__(self, model: bytes, path: str | Path):
        self.path = path
        self.pieces: list[tuple[str, float, int]] = []
        self.trainer: dict = dict(zip(_TRAINER.values(), (1, 0, 0, 0, 1, 2, -1), strict=True))
        self.normalizer: dict = dict(zip(_NORMALIZER.values(), (b"", 1, 1, 1), strict=True))
        settings = {2: (self.trainer, _TRAINER), 3: (self.normalizer, _NORMALIZER)}
        try:
            for number, value in fields(model):
                if number == 1:
                    piece: dict = dict(fields(_message(value)))
                    self.pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, NORMAL)))
                elif number in settings:
                    target, names = settings[number]
                    target.update(
                        (names[inner], _signed(found)) for inner, found in fields(_message(value)) if inner in names
                    )
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
            raise self._not_a_model("not a SentencePiece model") from error
        if not self.pieces:
            raise self._not_a_model("a SentencePiece model without pieces")

    @property
    def obstacle(self) -> str:
        """Why the conversion could not be exact; "" if it can be."""
        trainer, normalizer = self.trainer, self.normalizer
        if trainer["model_type"] != BPE:
            return "the model is not BPE"
        if not trainer["byte_fallback"]:
            return "unknown characters are not spelt in bytes"
        if normalizer["charsmap"] or normalizer["add_dummy_prefix"] or normalizer["remove_extra_whitespaces"]:
            return "it normalises text, adds a dummy prefix or drops spaces"
        if not normalizer["escape_whitespaces"] or trainer["suffix"]:
            return "spaces are not ordinary characters at the front of pieces"
        if trainer["bos_id"] < 0 or trainer["eos_id"] < 0:
            return "it has no document marks (bos, eos)"
        if len({text for text, _, _ in self._spaced()}) != len(self.pieces):
            return "two pieces have the same text"
        return ""

    def to_hugging_face(self) -> "tokenizers.Tokenizer":
        """A tokenizer with the same ids, without post-processor. Raises TokenizerError if there is an obstacle."""
        from tokenizers import AddedToken, Tokenizer, decoders, models

        if self.obstacle:
            raise TokenizerError(
                f"{self.path}: cannot be converted exactly: {self.obstacle}",
                remedy="train the tokenizer with `ssa tokenizer train` (BPE, byte fallback, identity normalisation)",
                id="tokenizer-not-convertible",
            )
        spaced = self._spaced()
        marks = {i: text for i, (text, _, kind) in enumerate(spaced) if kind in (CONTROL, UNKNOWN)}
        tokenizer = Tokenizer(
            models.BPE(
                vocab={text: i for i, (text, _, _) in enumerate(spaced)},
                merges=_merges(spaced),
                unk_token=marks[self.trainer["unk_id"]],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in marks.values()])
        own = [text for text, _, kind in spaced if kind == USER_DEFINED]
        tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in own])
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer

    def _spaced(self) -> list[tuple[str, float, int]]:
        return [(t.replace(SPACE_MARK, " ") if kind == NORMAL else t, s, kind) for t, s, kind in self.pieces]

    def _not_a_model(self, what: str) -> TokenizerError:
        return TokenizerError(
            f"{self.path}: {what}", remedy="name the run's own tokenizer model", id="sentencepiece-model-damaged"
        )


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; a varint as int, everything else as bytes.

    Thirty lines instead of a dependency: `sentencepiece_model_pb2` refuses some protobuf releases.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        match tag & 7:
            case 0:
                yield tag >> 3, varint()
                continue
            case 1:
                size = 8
            case 2:
                size = varint()
            case 5:
                size = 4
            case wire:
                raise ValueError(f"wire type {wire}")
        yield tag >> 3, message[at : at + size]
        at += size


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise TypeError("a number where a message should be")
    return value


def _signed(value: int | bytes) -> int | bytes:
    """Ids are int32: negative ones come as 64-bit two's complement."""
    return value - (1 << 64) if isinstance(value, int) and value >= 1 << 63 else value


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Pairs in the order SentencePiece joins them: by the joined piece's score; then the longer left part first."""
    score = {text: score for text, score, kind in pieces if kind == NORMAL}
    found = []
    for text, value in score.items():
        for cut in range(1, len(text)):
            if text[:cut] in score and text[cut:] in score:
                found.append((-value, -cut, text[:cut], text[cut:]))
    return [(left, right) for _, _, left, right in sorted(found)]
