"""Hugging Face `tokenizer.json` files, under the same promises as our own SentencePiece models.

The vocabulary must give back every text; marks are taken from the file's special tokens, and text that looks like a mark
is text. It refuses files whose tokenizer loses or changes text, or that have no token to end a document with.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import TokenizerError
from ssa_pipelines.tokenizer.sentencepiece_tokenizer import PROBE, Tokenizer

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|bos|>", "<|im_start|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "<|eos|>", "<|im_end|>")
_CONFIG = "tokenizer_config.json"


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` in memory, with the attributes and methods of Tokenizer.

    `bos_id` and `eos_id` are those of `tokenizer_config.json` beside the file, else the first of the usual names it has; a
    tokenizer with one mark only (GPT-2's `<|endoftext|>`) uses it for both.
    """

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, path: str | Path):
        import tokenizers

        self.path = Path(path)
        self.model = model
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
        except Exception as error:  # the library raises bare Exception
            raise TokenizerError(
                f"{path}: not a tokenizer.json ({error})", remedy="copy it again from the model it belongs to"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(ids.values()) + 1
        self._special = {t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special}
        bos, eos = self._marks(ids)
        self.bos_id: int = ids[bos]
        self.eos_id: int = ids[eos]
        self._config = json.dumps({"bos_token": bos, "eos_token": eos}).encode()
        self.fingerprint = hashlib.sha256(model + self._config).hexdigest()
        if self.decode(self.encode([PROBE])[0]) != PROBE:
            raise TokenizerError(
                f"{path}: does not give back the text it encodes (normalisation, added spaces, or unknown characters)",
                remedy="use a byte-level tokenizer without normaliser, or train one with train_tokenizer",
            )

    @property
    def files(self) -> dict[str, bytes]:
        return {self.file_name: self.model, _CONFIG: self._config}

    def encode(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without bos or eos. Raises TokenizerError for half of a surrogate pair."""
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts; put the one text in a list")
        try:
            # One text at a time: encode_batch starts a thread a core, and prepare runs a process a core already.
            return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        except (TypeError, UnicodeEncodeError) as error:
            raise TokenizerError(
                "a text holds half of a surrogate pair", remedy="replace lone surrogates (\\ud800-\\udfff) in it"
            ) from error

    def encode_long(self, text: str) -> NDArray[np.int32]:
        """Token ids of one text; it cannot be cut without a change, so the library holds about 200 bytes a character."""
        return np.array(self.encode([text])[0], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; special tokens yield nothing. Raises TokenizerError for an id outside the vocabulary."""
        tokens = [int(token) for token in tokens]
        if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise TokenizerError(
                f"a token id is outside 0..{self.vocab_size - 1}", remedy="decode with the tokenizer that encoded"
            )
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """A token's own text, as the vocabulary spells it."""
        return self._tokenizer.id_to_token(token) or ""

    def is_byte(self, token: int) -> bool:
        """Whether the token stands for a single byte of a character that has no piece."""
        piece = self.piece(token)
        return len(piece) == 6 and piece.startswith("<0x")

    def _marks(self, ids: dict[str, int]) -> tuple[str, str]:
        config = {}
        beside = self.path.with_name(_CONFIG)
        if beside.is_file():
            config = json.loads(beside.read_text(encoding="utf-8"))

        def named(key: str, usual: tuple[str, ...]) -> str | None:
            given = config.get(key)
            given = given.get("content") if isinstance(given, dict) else given
            return next((name for name in (given, *usual) if name in ids and name in self._special), None)

        bos, eos = named("bos_token", BOS_NAMES), named("eos_token", EOS_NAMES)
        if eos is None:
            raise TokenizerError(
                f"{self.path}: no special token ends a document (special tokens: {sorted(self._special)[:8]})",
                remedy="put its tokenizer_config.json, which names eos_token, beside it",
            )
        return bos or eos, eos
