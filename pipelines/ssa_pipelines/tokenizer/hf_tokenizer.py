"""Hugging Face `tokenizer.json` files as tokenizers.

The special tokens of the file give the document marks, and text that looks like a special token stays text. It refuses
files whose tokenizer loses or changes text, or that have no token to end a document with.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import TokenizerError
from ssa_pipelines.tokenizer.base import TOKENIZERS, Tokenizer, lone_surrogate

if TYPE_CHECKING:
    import tokenizers

BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|bos|>", "<|im_start|>")
EOS_NAMES = ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "<|eos|>", "<|im_end|>")
_CONFIG = "tokenizer_config.json"


@TOKENIZERS.register("Hugging Face")
class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` in memory.

    `bos_id` and `eos_id` are those of `tokenizer_config.json` in the same folder, else the first of the usual names that
    exists. A tokenizer with one mark only (GPT-2's `<|endoftext|>`) uses it for both.
    """

    file_name = "tokenizer.json"

    def __init__(self, model: bytes, path: str | Path):
        self.path = Path(path)
        self.model = model
        self._tokenizer = self.to_hugging_face()
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1
        self._special = {t.content for t in self._tokenizer.get_added_tokens_decoder().values() if t.special}
        bos, eos = self._marks(ids)
        self.bos_id = ids[bos]
        self.eos_id = ids[eos]
        self._config = json.dumps({"bos_token": bos, "eos_token": eos}).encode()
        self.fingerprint = hashlib.sha256(model + self._config).hexdigest()
        self._check_round_trip(
            "normalisation, added spaces, or unknown characters",
            "use a byte-level tokenizer without normaliser, or train one with train_tokenizer",
        )

    @classmethod
    def reads(cls, model: bytes) -> bool:
        return model.lstrip().startswith(b"{")

    @property
    def files(self) -> dict[str, bytes]:
        return {self.file_name: self.model, _CONFIG: self._config}

    @property
    def special_tokens(self) -> dict[str, str]:
        bos, eos = self.piece(self.bos_id), self.piece(self.eos_id)
        return {"bos_token": bos, "eos_token": eos, "pad_token": eos}

    @property
    def export_obstacle(self) -> str:
        return ""

    def to_hugging_face(self) -> "tokenizers.Tokenizer":
        import tokenizers

        try:
            return tokenizers.Tokenizer.from_str(self.model.decode())
        except Exception as error:  # the library raises bare Exception
            problem, remedy = (
                f"{self.path}: not a tokenizer.json ({error})",
                "copy it again from the model it belongs to",
            )
            raise TokenizerError(problem, remedy=remedy, id="not-a-tokenizer-json") from error

    def encode(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts; put the one text in a list")
        try:
            # One text at a time: encode_batch starts one thread per core, and prepare already runs one process per core.
            return [self._tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
        except (TypeError, UnicodeEncodeError) as error:
            raise lone_surrogate() from error

    def encode_long(self, text: str) -> NDArray[np.int32]:
        """Cutting the text would change its tokens, so the library holds about 200 bytes per character."""
        return np.array(self.encode([text])[0], np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        ids = [int(token) for token in tokens]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise self._outside_vocabulary()
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def piece(self, token: int) -> str:
        return self._tokenizer.id_to_token(token) or ""

    def is_byte(self, token: int) -> bool:
        piece = self.piece(token)
        return len(piece) == 6 and piece.startswith("<0x")

    def _marks(self, ids: dict[str, int]) -> tuple[str, str]:
        """The texts of BOS and EOS."""
        config = {}
        config_path = self.path.with_name(_CONFIG)
        if config_path.is_file():
            config = json.loads(config_path.read_text(encoding="utf-8"))

        def named(key: str, usual: tuple[str, ...]) -> str | None:
            given = config.get(key)
            given = given.get("content") if isinstance(given, dict) else given
            return next((name for name in (given, *usual) if name in ids and name in self._special), None)

        bos, eos = named("bos_token", BOS_NAMES), named("eos_token", EOS_NAMES)
        if eos is None:
            raise TokenizerError(
                f"{self.path}: no special token ends a document (special tokens: {sorted(self._special)[:8]})",
                remedy="put its tokenizer_config.json, which names eos_token, into the same folder",
                id="tokenizer-without-eos",
            )
        return bos or eos, eos
