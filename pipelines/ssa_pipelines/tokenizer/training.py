"""Trains a SentencePiece tokenizer from a stream of documents that may exceed memory; equal input gives equal bytes.

It refuses settings outside SentencePiece's limits before it reads the corpus, and vocabulary sizes the corpus cannot fill,
naming a size that works.
"""

import io
import os
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from ssa_pipelines.corpus.documents import as_documents
from ssa_pipelines.corpus.sources import Sources
from ssa_pipelines.errors import CorpusError, TokenizerError
from ssa_pipelines.tokenizer.base import Tokenizer
from ssa_pipelines.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer

SAMPLE_BYTES, CHARACTER_COVERAGE = 64 << 20, 0.9995  # defaults
_LONGEST_LINE = 4000  # bytes; SentencePiece silently drops training sentences over max_sentence_length


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
    vocab_size: pieces in total: 3 marks (`<unk>` 0, `<s>` 1, `</s>` 2), the newline, 256 bytes, and what is learnt.
    model_type: "bpe" or "unigram".
    sample_bytes: largest amount of text to learn from, 64 MiB by default. Lines are drawn evenly from a larger corpus, by
        `seed`. Training holds several times as much in memory.
    character_coverage: share of the characters seen that get a piece of their own, 0.98 to 1; the rest is spelt in bytes.
    Raises TokenizerError for impossible settings, before the corpus is read, and for a vocab_size the corpus cannot fill;
    CorpusError for an unreadable or empty corpus.
    """
    if model_type not in ("bpe", "unigram"):
        problem, remedy = f"model_type {model_type!r} is not known", "use 'bpe' or 'unigram'"
        raise TokenizerError(problem, remedy=remedy, id="unknown-model-type")
    if sample_bytes < 1:
        problem, remedy = (
            f"sample_bytes {sample_bytes}: nothing to learn from",
            f"use 1 or more, such as {SAMPLE_BYTES}",
        )
        raise TokenizerError(problem, remedy=remedy, id="sample-bytes")
    if not 0.98 <= character_coverage <= 1:  # SentencePiece's own limits; NaN is outside of them
        raise TokenizerError(
            f"character_coverage {character_coverage}: not in 0.98..1",
            remedy=f"use {CHARACTER_COVERAGE}, 1.0 for a small alphabet, or less for one of many rare characters",
            id="character-coverage",
        )
    lines = _sample_lines(as_documents(documents_or_sources, text_field=text_field), sample_bytes, seed)
    if not lines:
        problem, remedy = "the tokenizer's corpus holds no text", "point at a corpus that is not empty"
        raise CorpusError(problem, remedy=remedy, id="tokenizer-corpus-empty")
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
            num_threads=1,  # with more, ties between equal counts may be broken differently
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
    return SentencePieceTokenizer(buffer.getvalue(), path)


def _sample_lines(documents: Iterable[str], budget: int, seed: int) -> list[str]:
    """Lines drawn evenly from the whole stream, at most `budget` bytes in memory.

    Each line draws a number in [0, 1) and is kept while that is under a threshold, which halves when the budget is full.
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
    """Lines without their newline, which is a piece by itself. Long ones are cut at spaces so that none is dropped."""
    for document in documents:
        for line in document.split("\n"):
            line = line.replace("\0", "")  # SentencePiece drops a sentence that holds one; encoding spells it in bytes
            begin = 0  # an index, since a line may be a whole book: cutting the rest off would copy it for each piece
            while True:
                head = line[begin : begin + _LONGEST_LINE]
                if len(head) < _LONGEST_LINE and len(head.encode()) <= _LONGEST_LINE:
                    break
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
            id="vocab-size-too-large",
        )
    if match := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return TokenizerError(
            f"vocab_size {vocab_size}: marks, bytes and the characters of this corpus alone are {match[1]} pieces",
            remedy=f"set vocab_size above {match[1]}, or lower character_coverage",
            id="vocab-size-too-small",
        )
    return TokenizerError(
        f"vocab_size {vocab_size}: SentencePiece failed ({message})",
        remedy="try another vocab_size or a larger corpus",
        id="tokenizer-training-failed",
    )
