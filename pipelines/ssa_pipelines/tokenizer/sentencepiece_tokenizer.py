"""SentencePiece tokenizer: training from a stream of documents, loading, encoding, decoding, and its fingerprint.

`decode(encode([text])[0]) == text` holds for every string that UTF-8 can express: nothing is normalised, no space is
added or dropped, unknown characters become byte pieces, and a newline is always one token. It refuses models that lose
text or lack document marks, and vocabulary sizes the corpus cannot fill, naming a size that works.
"""

import functools
import hashlib
import io
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece
from numpy.typing import NDArray

from ssa_pipelines.corpus.documents import as_documents
from ssa_pipelines.corpus.sources import Sources
from ssa_pipelines.errors import CorpusError, TokenizerError

SAMPLE_BYTES, CHARACTER_COVERAGE = 64 << 20, 0.9995  # what a tokenizer is trained with by default
_SPACE_MARK = "\u2581"  # SentencePiece's own mark for a space; in a document it must not turn into one
_LONGEST_LINE = 4000  # bytes; SentencePiece drops training sentences over max_sentence_length in silence
_SEGMENT = 1 << 16  # characters handed to SentencePiece at once: its memory grows with about 100 bytes a character
PROBE = " a  b\n\n\tc\x00\u00e9 \U0001f600<s>"
_SEVERAL_WORDS = re.compile("[^\u2581]\u2581|\n(?s:.)")
_ODD = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]|([^\u2581 \n])\1{7}")


class Tokenizer:
    """A SentencePiece model held in memory. Build one with `Tokenizer.load` or `train_tokenizer`.

    Attributes: `path`, `vocab_size`, `bos_id`, `eos_id`, `fingerprint` (sha256 of the model file, hexadecimal); `file_name`
    and `files`: what to call the model, and all of its files by name, where it is to be loaded from again.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: bytes, path: str | Path):
        self.path = Path(path)
        self.model = model
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise TokenizerError(
                f"{path}: not a SentencePiece model", remedy="train one with train_tokenizer, or copy the file again"
            ) from error
        self.vocab_size: int = self._processor.vocab_size()
        self.bos_id: int = self._processor.bos_id()
        self.eos_id: int = self._processor.eos_id()
        if self.bos_id < 0 or self.eos_id < 0 or self.bos_id == self.eos_id:
            raise TokenizerError(
                f"{path}: bos id {self.bos_id}, eos id {self.eos_id}: a document needs two different marks",
                remedy="train the model with bos_id and eos_id set",
            )
        encode = self._processor.encode
        if self._processor.decode(encode(PROBE)) != PROBE:
            raise TokenizerError(
                f"{path}: does not give back the text it encodes (normalisation, or no byte fallback)",
                remedy="train it with byte_fallback, identity normalization and remove_extra_whitespaces=False",
            )
        # Ours: text cut after a newline or before a word's space encodes to the same tokens. Not so with a model that puts
        # a dummy space before every text (Llama 2) or has pieces of several words; it is always given a whole document.
        self._may_cut = encode("ab\ncd ef") == encode("ab\n") + encode("cd") + encode(" ef") and not any(
            _SEVERAL_WORDS.search(self.piece(token)) for token in range(self.vocab_size)
        )
        self._space_mark_ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]

    @staticmethod
    def load(path: str | Path) -> "Tokenizer":
        """Reads a SentencePiece model or a Hugging Face tokenizer.json (hf_tokenizer.py), by what is in it.

        Raises TokenizerError if it is missing, damaged or unsuitable.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerError(
                f"{path}: cannot be read ({error.strerror})", remedy="name a tokenizer model file, or train one first"
            ) from error
        if model.lstrip().startswith(b"{"):
            from ssa_pipelines.tokenizer.hf_tokenizer import HuggingFaceTokenizer

            return HuggingFaceTokenizer(model, path)
        return Tokenizer(model, path)

    @property
    def files(self) -> dict[str, bytes]:
        return {self.file_name: self.model}

    def piece(self, token: int) -> str:
        """A token's own text, as the vocabulary spells it."""
        return self._processor.id_to_piece(token)

    def is_byte(self, token: int) -> bool:
        """Whether the token stands for one byte of a character that has no piece."""
        return self._processor.is_byte(token)

    def encode(self, texts: Sequence[str], *, threads: int = 1) -> list[list[int]]:
        """Token ids of each text, without bos or eos. The ids do not depend on `threads`.

        Raises TokenizerError for a text that UTF-8 cannot express (half of a surrogate pair).
        """
        if isinstance(texts, str):
            raise TypeError("encode takes a list of texts; put the one text in a list")
        segments = [list(self._segments(text)) for text in texts]
        try:
            encoded = self._processor.encode([s for cut in segments for s in cut], num_threads=threads)
        except TypeError as error:
            raise TokenizerError(
                "a text holds half of a surrogate pair", remedy="replace lone surrogates (\\ud800-\\udfff) in it"
            ) from error
        result, taken = [], iter(encoded)
        for cut in segments:
            tokens: list[int] = []
            for segment, ids in zip(cut, taken):  # noqa: B905 (`taken` goes on with the next text's segments)
                tokens += self._space_mark_ids if segment == _SPACE_MARK and self._may_cut else ids
            result.append(tokens)
        return result

    def encode_long(self, text: str) -> NDArray:
        """Token ids of one text: those of `encode`, unsigned and as small as the vocabulary allows, in less memory."""
        kind = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        arrays, batch, size = [np.empty(0, kind)], [], 0
        for segment in self._segments(text):
            batch.append(segment)
            size += len(segment)
            if size >= 1 << 20:
                arrays += (np.array(ids, kind) for ids in self.encode(batch))
                batch, size = [], 0
        arrays += (np.array(ids, kind) for ids in self.encode(batch))
        return np.concatenate(arrays)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids; bos, eos and other control tokens yield nothing.

        Raises TokenizerError for an id outside the vocabulary.
        """
        try:
            return self._processor.decode([int(token) for token in tokens])
        except IndexError as error:
            raise TokenizerError(
                f"a token id is outside 0..{self.vocab_size - 1}", remedy="decode with the tokenizer that encoded"
            ) from error

    def inspect(self, sample: Iterable[str] = (PROBE,)) -> dict:
        """What the tokenizer is, and how it fares on the texts of `sample`.

        "bytes_per_token", "tokens_per_word", "byte_piece_share"; "character_coverage": share of the sample's characters
        that have pieces of their own and are not spelt in bytes; "odd_pieces": ones with control or replacement
        characters, or that repeat one character eight times and more, the first 20.
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

    def _segments(self, text: str) -> Iterator[str]:
        """Cuts a text where cutting does not change its tokens; most texts stay whole. The space mark stands alone."""
        if not self._may_cut or (len(text) <= _SEGMENT and _SPACE_MARK not in text):
            yield text
            return
        for part in re.split(f"({_SPACE_MARK})", text):
            begin = 0
            while len(part) - begin > _SEGMENT:
                end = _cut(part, begin)
                yield part[begin:end]
                begin = end
            if begin < len(part):
                yield part[begin:]


def _cut(text: str, begin: int) -> int:
    """Where the segment that begins here ends: after a newline, else before a word, as far as _SEGMENT allows or soon after."""
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


@functools.lru_cache(4)
def cached_tokenizer(path: str) -> Tokenizer:
    """The tokenizer at `path`, loaded once a process."""
    return Tokenizer.load(path)


def train_tokenizer(
    documents_or_sources: Sources | Iterable[str],
    out_path: str | Path,
    *,
    vocab_size: int,
    model_type: str = "bpe",
    sample_bytes: int = SAMPLE_BYTES,
    character_coverage: float = CHARACTER_COVERAGE,
    text_field: str = "text",
    seed: int = 0,
) -> Tokenizer:
    """Trains a SentencePiece model and writes it to `out_path`, whole or not at all; equal input gives equal bytes.

    documents_or_sources: names of text (sources.py), or any other iterable of documents (strings); it may exceed memory.
    vocab_size: pieces in all, of which 3 are marks (`<unk>` 0, `<s>` 1, `</s>` 2), 1 is the newline and 256 are bytes.
    model_type: "bpe" or "unigram".
    sample_bytes: most text to learn from, 64 MiB by default; of a larger corpus lines are drawn evenly from all of it, by
        `seed`. Training holds several times as much in memory.
    character_coverage: share of the characters seen that get a piece of their own, 0.98 to 1; the rest is spelt in bytes.
    Raises CorpusError for an unreadable or empty corpus, TokenizerError for a vocab_size that cannot be had and for settings
    that are none; the corpus is not read then.
    """
    if model_type not in ("bpe", "unigram"):
        raise TokenizerError(f"model_type {model_type!r} is not known", remedy="use 'bpe' or 'unigram'")
    if sample_bytes < 1:
        raise TokenizerError(
            f"sample_bytes {sample_bytes}: nothing to learn from",
            remedy=f"use 1 or more; {SAMPLE_BYTES} is the default",
        )
    if not 0.98 <= character_coverage <= 1:  # SentencePiece's own limits; NaN is outside of them
        raise TokenizerError(
            f"character_coverage {character_coverage}: not in 0.98..1",
            remedy=f"use {CHARACTER_COVERAGE}, 1.0 for a small alphabet, or less for one of many rare characters",
        )
    lines = _sample_lines(as_documents(documents_or_sources, text_field=text_field), sample_bytes, seed)
    if not lines:
        raise CorpusError("the tokenizer's corpus holds no text", remedy="point at a corpus that is not empty")
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=buffer,
            model_type=model_type,
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=["\n"],
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,  # indentation in one token
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            character_coverage=character_coverage,
            max_sentence_length=_LONGEST_LINE + 192,
            num_threads=1,  # with more, equal counts may be settled in another order
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(error, vocab_size) from error
    path = Path(out_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return Tokenizer(buffer.getvalue(), path)


def _sample_lines(documents: Iterable[str], budget: int, seed: int) -> list[str]:
    """Lines drawn evenly from the whole stream, `budget` bytes at most in memory.

    Each line draws a number in [0, 1) and stays while it is under a threshold that halves whenever the budget is full.
    """
    draw, threshold, size = random.Random(seed).random, 1.0, 0
    kept: list[tuple[float, str, int]] = []
    for line in _lines(documents):
        number = draw()
        if number >= threshold:
            continue
        kept.append((number, line, len(line.encode())))
        size += kept[-1][2]
        while size > budget and len(kept) > 1:
            threshold /= 2
            kept = [entry for entry in kept if entry[0] < threshold]
            size = sum(entry[2] for entry in kept)
    return [line for _, line, _ in kept]


def _lines(documents: Iterable[str]) -> Iterator[str]:
    """Lines without their newline (it is a piece of its own), long ones cut at spaces so that none is dropped."""
    for document in documents:
        for line in document.split("\n"):
            line = line.replace("\0", "")  # SentencePiece drops a sentence that holds one; encoding spells it in bytes
            begin = (
                0  # a line may be a whole book: what is left of it is neither copied nor encoded again for each piece
            )
            while (
                len(head := line[begin : begin + _LONGEST_LINE]) == _LONGEST_LINE or len(head.encode()) > _LONGEST_LINE
            ):
                head = head.encode()[:_LONGEST_LINE].decode(errors="ignore")
                if begin + len(head) == len(line):
                    break
                end = head.rfind(" ")
                end = end if end > 0 else len(head)
                yield line[begin : begin + end]
                begin += end
            if (rest := line[begin:]).strip():
                yield rest


def _training_error(error: RuntimeError, vocab_size: int) -> TokenizerError:
    message = str(error)
    if match := re.search(r"too high \(\d+\)\. Please set it to a value <= (\d+)", message):
        return TokenizerError(
            f"vocab_size {vocab_size}: this corpus yields at most {match[1]} pieces",
            remedy=f"set vocab_size to {match[1]} or less, or give a larger corpus",
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return TokenizerError(
            f"vocab_size {vocab_size}: marks, bytes and this corpus's characters alone are {match[1]} pieces",
            remedy=f"set vocab_size above {match[1]}, or lower character_coverage",
        )
    return TokenizerError(
        f"vocab_size {vocab_size}: SentencePiece refuses ({message})",
        remedy="try another vocab_size or a larger corpus",
    )
