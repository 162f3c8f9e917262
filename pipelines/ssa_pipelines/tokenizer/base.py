"""What a tokenizer is: text to token ids and back without loss, known by a fingerprint.

One module per variant in this package. `Tokenizer.load` picks the variant by the contents of the file, and everyone else
uses the methods below. `decode(encode([text])[0]) == text` holds for every string that UTF-8 can express.
"""

import functools
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from numpy.typing import NDArray

from ssa_pipelines.errors import TokenizerError
from ssa_pipelines.registry import Registry

if TYPE_CHECKING:
    import tokenizers

PROBE = " a  b\n\n\tc\x00\u00e9 \U0001f600<s>"  # a tokenizer that does not give this text back is refused
_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]|([^\u2581 \n])\1{7}")


class Tokenizer(ABC):
    """A tokenizer model in memory. Build one with `Tokenizer.load` or `train_tokenizer`.

    file_name: what the model file is called in a dataset or run folder. path: the file it was loaded from. model: its bytes.
    fingerprint: sha256, hexadecimal, of everything that decides the token ids. bos_id, eos_id: around each document.
    """

    file_name: ClassVar[str]
    path: Path
    model: bytes
    fingerprint: str
    vocab_size: int
    bos_id: int
    eos_id: int

    @abstractmethod
    def __init__(self, model: bytes, path: str | Path):
        """Raises TokenizerError for a model that is damaged, loses text or has no document marks."""

    @classmethod
    @abstractmethod
    def reads(cls, model: bytes) -> bool:
        """Whether a file of this variant begins like this one."""

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Reads a tokenizer file of any variant. Raises TokenizerError if it is missing, damaged or unsuitable."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            problem = f"{path}: cannot be read ({error.strerror})"
            remedy = "name a tokenizer model file, or train one first"
            raise TokenizerError(problem, remedy=remedy, id="tokenizer-unreadable") from error
        for variant in TOKENIZERS.variants():
            if variant.reads(model):
                return variant(model, path)
        known = " or ".join(f"{TOKENIZERS[name].file_name} ({name})" for name in TOKENIZERS.names())
        raise TokenizerError(
            f"{path}: not a tokenizer file",
            remedy=f"name a {known}, or copy the file again",
            id="unknown-tokenizer-format",
        )

    @staticmethod
    def file_names() -> list[str]:
        """What the model files of all variants are called; one that others may be converted from comes earlier."""
        return sorted((variant.file_name for variant in TOKENIZERS.variants()), reverse=True)

    @property
    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """All files the tokenizer needs to be loaded again, by name."""

    @property
    def pad_id(self) -> int:
        """The token that pads a batch of prompts."""
        return self.eos_id

    @property
    def companion_files(self) -> dict[str, bytes]:
        """Files kept next to an exported tokenizer.json, because it was converted from them."""
        return {}

    @property
    @abstractmethod
    def special_tokens(self) -> dict[str, str]:
        """Texts of the special tokens as transformers calls them: bos_token, eos_token, pad_token and perhaps unk_token."""

    @property
    @abstractmethod
    def export_obstacle(self) -> str:
        """Why no tokenizer.json could give exactly the same ids; "" if one can."""

    @abstractmethod
    def to_hugging_face(self) -> "tokenizers.Tokenizer":
        """The same tokenizer for transformers: equal ids for every text, no marks added. Raises TokenizerError."""

    def conversion_probes(self) -> list[str]:
        """Texts that exercise every piece, to compare after a conversion; none where nothing is converted."""
        return []

    @abstractmethod
    def encode(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without bos or eos. The ids do not depend on `threads`.

        Raises TokenizerError for a text that UTF-8 cannot express (half of a surrogate pair).
        """

    @abstractmethod
    def encode_long(self, text: str) -> NDArray:
        """Token ids of one text, those of `encode`, as an integer array [tokens] that may take less memory."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; bos, eos and other control tokens yield nothing.

        Raises TokenizerError for an id outside the vocabulary.
        """

    @abstractmethod
    def piece(self, token: int) -> str:
        """A token's own text, as the vocabulary spells it."""

    @abstractmethod
    def is_byte(self, token: int) -> bool:
        """Whether the token stands for one byte of a character that has no piece."""

    def inspect(self, sample: Iterable[str] = (PROBE,)) -> dict:
        """A report: what the tokenizer is, and statistics over the texts of `sample`.

        "character_coverage": share of the sample's characters that have pieces of their own and are not spelt in bytes.
        "odd_pieces": the first 20 with control or replacement characters, or one character repeated eight times or more.
        """
        texts = words = size = count = spelt = 0
        characters: Counter[str] = Counter()
        for text in sample:
            (ids,) = self.encode([text])
            texts, words, size = texts + 1, words + len(text.split()), size + len(text.encode())
            count, spelt = count + len(ids), spelt + sum(map(self.is_byte, ids))
            characters.update(text)
        covered = sum(
            times for character, times in characters.items() if not any(map(self.is_byte, self.encode([character])[0]))
        )
        pieces = [self.piece(token) for token in range(self.vocab_size)]
        return {
            "path": str(self.path),
            "kind": type(self).__name__,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "bos_id": self.bos_id,
            "eos_id": self.eos_id,
            "model_bytes": len(self.model),
            "sample_texts": texts,
            "sample_bytes": size,
            "sample_tokens": count,
            "bytes_per_token": size / max(count, 1),
            "tokens_per_word": count / max(words, 1),
            "byte_piece_share": spelt / max(count, 1),
            "character_coverage": covered / max(characters.total(), 1),
            "longest_pieces": sorted(pieces, key=len)[-5:],
            "odd_pieces": [piece for piece in pieces if _ODD.search(piece)][:20],
        }

    def _check_round_trip(self, reason: str, remedy: str) -> None:
        if self.decode(self.encode([PROBE])[0]) != PROBE:
            problem = f"{self.path}: does not give back the text it encodes ({reason})"
            raise TokenizerError(problem, remedy=remedy, id="tokenizer-loses-text")

    def _outside_vocabulary(self) -> TokenizerError:
        problem, remedy = f"a token id is outside 0..{self.vocab_size - 1}", "decode with the tokenizer that encoded"
        return TokenizerError(problem, remedy=remedy, id="token-outside-vocabulary")


TOKENIZERS: Registry[type[Tokenizer]] = Registry("ssa_pipelines.tokenizer")


def lone_surrogate() -> TokenizerError:
    """The error for a text that UTF-8 cannot express."""
    remedy = "replace lone surrogates (\\ud800-\\udfff) in it"
    return TokenizerError("a text holds half of a surrogate pair", remedy=remedy, id="lone-surrogate")


@functools.lru_cache(4)
def cached_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at `path`, loaded once per process."""
    return Tokenizer.load(path)
