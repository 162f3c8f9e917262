"""SentencePiece models as tokenizers.

Nothing is normalised, no space is added or dropped, unknown characters become byte pieces, and a newline is one token. It
refuses models that lose text or lack document marks.
"""

import functools
import hashlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from ssa_pipelines.errors import TokenizerError
from ssa_pipelines.tokenizer.base import TOKENIZERS, Tokenizer, lone_surrogate
from ssa_pipelines.tokenizer.sentencepiece_model import SPACE_MARK, SentencePieceModel

if TYPE_CHECKING:
    import tokenizers

_SEGMENT = 1 << 16  # characters encoded at once: SentencePiece needs about 100 bytes of memory per character
_SEVERAL_WORDS = re.compile("[^\u2581]\u2581|\n(?s:.)")


@TOKENIZERS.register("SentencePiece")
class SentencePieceTokenizer(Tokenizer):
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, path: str | Path):
        self.path = Path(path)
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            problem, remedy = (
                f"{path}: not a SentencePiece model",
                "train one with train_tokenizer, or copy the file again",
            )
            raise TokenizerError(problem, remedy=remedy, id="not-a-sentencepiece-model") from error
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id()
        self.eos_id = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0 or self.bos_id == self.eos_id:
            problem = f"{path}: bos id {self.bos_id}, eos id {self.eos_id}: BOS and EOS must be different tokens"
            remedy = "train the model with bos_id and eos_id set"
            raise TokenizerError(problem, remedy=remedy, id="tokenizer-without-marks")
        encode = self._processor.encode
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._may_cut = False
        self._check_round_trip(
            "normalisation, or no byte fallback",
            "train it with byte_fallback, identity normalization and remove_extra_whitespaces=False",
        )
        # In models of `train_tokenizer`, text cut after a newline or before a word's space encodes to the same tokens. Not so
        # in a model that adds a dummy space (Llama 2) or has pieces of several words: it is always given whole documents.
        self._may_cut = encode("ab\ncd ef") == encode("ab\n") + encode("cd") + encode(" ef") and not any(
            _SEVERAL_WORDS.search(self.piece(token)) for token in range(self.vocab_size)
        )

    @classmethod
    def reads(cls, model: bytes) -> bool:
        return model.startswith(b"\n")  # the tag of the first piece, field 1 of the protobuf message

    @property
    def pad_id(self) -> int:
        pad: int = self._processor.pad_id()
        return pad if pad >= 0 else self.eos_id

    @property
    def files(self) -> dict[str, bytes]:
        return {self.file_name: self.model}

    @property
    def companion_files(self) -> dict[str, bytes]:
        return self.files

    @property
    def special_tokens(self) -> dict[str, str]:
        ids = {"unk": self._processor.unk_id(), "bos": self.bos_id, "eos": self.eos_id, "pad": self.pad_id}
        return {f"{name}_token": self.piece(token) for name, token in ids.items()}

    @property
    def export_obstacle(self) -> str:
        return self._parsed.obstacle

    def to_hugging_face(self) -> "tokenizers.Tokenizer":
        return self._parsed.to_hugging_face()

    def conversion_probes(self) -> list[str]:
        pieces = [
            self.piece(token).replace(SPACE_MARK, " ") for token in range(self.vocab_size) if not self.is_byte(token)
        ]
        return ["".join(pieces[i : i + 64]) for i in range(0, len(pieces), 64)]

    @functools.cached_property
    def _parsed(self) -> SentencePieceModel:
        return SentencePieceModel(self.model, self.path)

    def piece(self, token: int) -> str:
        piece: str = self._processor.id_to_piece(token)
        return piece

    def is_byte(self, token: int) -> bool:
        return bool(self._processor.is_byte(token))

    def encode(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts; put the one text in a list")
        segments = [list(self._segments(text)) for text in texts]
        try:
            encoded = self._processor.encode([s for cut in segments for s in cut], num_threads=threads)
        except TypeError as error:
            raise lone_surrogate() from error
        result, taken = [], iter(encoded)
        for cut in segments:
            tokens: list[int] = []
            for segment, ids in zip(cut, taken):  # noqa: B905 (`taken` goes on with the next text's segments)
                tokens += self._space_mark_ids if segment == SPACE_MARK and self._may_cut else ids
            result.append(tokens)
        return result

    def encode_long(self, text: str) -> NDArray:
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        arrays: list[NDArray] = [np.empty(0, kind)]
        batch: list[str] = []
        size = 0
        for segment in self._segments(text):
            batch.append(segment)
            size += len(segment)
            if size >= 1 << 20:
                arrays += (np.array(ids, kind) for ids in self.encode(batch))
                batch, size = [], 0
        arrays += (np.array(ids, kind) for ids in self.encode(batch))
        return np.concatenate(arrays)

    def decode(self, tokens: Sequence[int]) -> str:
        try:
            text: str = self._processor.decode([int(token) for token in tokens])
        except IndexError as error:
            raise self._outside_vocabulary() from error
        return text

    def _segments(self, text: str) -> Iterator[str]:
        """Cuts a text where cutting does not change its tokens. Most texts stay whole; the space mark stands alone."""
        if not self._may_cut or (len(text) <= _SEGMENT and SPACE_MARK not in text):
            yield text
            return
        for part in re.split(f"({SPACE_MARK})", text):
            begin = 0
            while len(part) - begin > _SEGMENT:
                end = _cut(part, begin)
                yield part[begin:end]
                begin = end
            if begin < len(part):
                yield part[begin:]


def _cut(text: str, begin: int) -> int:
    """End of the segment that begins here: after a newline, else before a word, at most _SEGMENT characters or soon after."""
    longest = begin + _SEGMENT
    if end := text.rfind("\n", begin, longest) + 1:
        return end
    space = text.rfind(" ", begin + 1, longest)
    while space > 0 and text[space - 1] == " ":  # of several spaces only the first begins a word's piece for certain
        space = text.rfind(" ", begin + 1, space)
    if space > 0:
        return space
    following = re.compile(r"\n|[^ ](?= )").search(text, longest - 1)
    return following.end() if following else len(text)
