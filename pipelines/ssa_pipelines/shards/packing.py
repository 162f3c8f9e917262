"""Documents -> rows of one fixed length, and a row's form on disk.

Every token lands in exactly one row, in order, and only the last row is padded; for each token the row says where its
own document begins, so attention never has to look across a border, and which document of the corpus that is. It refuses
token ids outside the vocabulary.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import DataError, TokenizerError

NO_DOCUMENT = (1 << 32) - 1  # the document number of padding


class PackedRow(NamedTuple):
    """One row.

    tokens: [row_length], uint16 or uint32.
    starts: [documents], uint16 or uint32, ascending from 0: the index at which each document of the row begins.
    documents: [documents], uint32: the number of each, by which the ledger finds it in the corpus.
    padding: number of padding tokens at the end. Each is an eos token and a document of its own, so that it takes part
        in nothing: it attends to itself alone and predicts nothing.
    """

    tokens: NDArray
    starts: NDArray
    documents: NDArray[np.uint32]
    padding: int


class Packer:
    """Fills rows with documents, one after the other.

    A document that crosses the end of a row goes on at the start of the next one as a document of its own, without a
    second bos: its context is what the row holds of it.
    """

    def __init__(self, row_length: int, *, eos_id: int, vocab_size: int):
        if row_length < 2:
            raise DataError(
                f"row_length {row_length}: a row of one token has nothing to predict", remedy="use 2 or more"
            )
        self.row_length, self.eos_id = row_length, eos_id
        self._token_dtype, self._start_dtype = smallest_dtype(vocab_size), smallest_dtype(row_length)
        self._begin_row()

    def add(self, tokens: NDArray, document: int) -> list[PackedRow]:
        """Appends one document, marks included (see `marked`); returns the rows that became full."""
        rows = []
        while tokens.size:
            room = self.row_length - self._filled
            part, tokens = tokens[:room], tokens[room:]
            self._starts.append(self._filled)
            self._documents.append(document)
            self._tokens[self._filled : self._filled + part.size] = part
            self._filled += part.size
            if self._filled == self.row_length:
                rows.append(self._end_row(padding=0))
        return rows

    def unfinished(self) -> list[tuple[NDArray, int]]:
        """(tokens, document) of what the row begun so far holds; adding them to another packer continues there."""
        ends = [*self._starts[1:], self._filled]
        pieces = zip(self._starts, ends, self._documents, strict=False)
        return [(self._tokens[start:end], document) for start, end, document in pieces]

    def finish(self) -> list[PackedRow]:
        """The last, padded row, or none when the documents end with a row."""
        if not self._filled:
            return []
        padding = range(self._filled, self.row_length)
        self._starts.extend(padding)
        self._documents.extend([NO_DOCUMENT] * len(padding))
        self._tokens[self._filled :] = self.eos_id
        return [self._end_row(padding=len(padding))]

    def _begin_row(self) -> None:
        self._tokens = np.empty(self.row_length, self._token_dtype)
        self._starts: list[int] = []
        self._documents: list[int] = []
        self._filled = 0

    def _end_row(self, padding: int) -> PackedRow:
        starts, documents = np.array(self._starts, self._start_dtype), np.array(self._documents, np.uint32)
        row = PackedRow(self._tokens, starts, documents, padding)
        self._begin_row()
        return row


def marked(tokens: Sequence[int], *, bos_id: int, eos_id: int, vocab_size: int) -> NDArray:
    """bos + tokens + eos, in the type rows have. Raises TokenizerError for an id outside the vocabulary."""
    tokens = np.asarray(
        tokens, None if len(tokens) else np.int64
    )  # as it is: a book's tokens are not copied for the check
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        wrong = next(int(t) for t in tokens if not 0 <= t < vocab_size)
        raise TokenizerError(
            f"token id {wrong} is outside the vocabulary (vocab_size {vocab_size})",
            remedy="encode with the tokenizer this dataset is prepared for",
        )
    document = np.empty(tokens.size + 2, smallest_dtype(vocab_size))
    document[0], document[1:-1], document[-1] = bos_id, tokens, eos_id
    return document


def pack(
    documents: Iterable[Sequence[int]], row_length: int, *, bos_id: int, eos_id: int, vocab_size: int
) -> Iterator[PackedRow]:
    """Packs documents (token ids without bos and eos), numbered from 0, into rows; see Packer."""
    packer = Packer(row_length, eos_id=eos_id, vocab_size=vocab_size)
    for number, document in enumerate(documents):
        yield from packer.add(marked(document, bos_id=bos_id, eos_id=eos_id, vocab_size=vocab_size), number)
    yield from packer.finish()


def doc_starts(starts: NDArray, row_length: int) -> NDArray[np.int32]:
    """Per token the index of its document's first token: int32 [row_length], from a row's `starts`."""
    starts = starts.astype(np.int32)
    return np.repeat(starts, np.diff(starts, append=np.int32(row_length)))


def smallest_dtype(values: int) -> np.dtype:
    """uint16 if the numbers 0..values-1 fit, else uint32."""
    return np.dtype(np.uint16 if values <= 1 << 16 else np.uint32)


def mds_columns(row_length: int, vocab_size: int) -> dict[str, str]:
    """The MDS columns of a row. `tokens` has a fixed shape, which reads twice as fast as a variable one."""
    return {
        "tokens": f"ndarray:{smallest_dtype(vocab_size)}:{row_length}",
        "starts": f"ndarray:{smallest_dtype(row_length)}",
        "documents": "ndarray:uint32",
        "checksum": "uint32",
    }


def to_sample(row: PackedRow) -> dict:
    """The MDS sample of a row."""
    columns = {"tokens": row.tokens, "starts": row.starts, "documents": row.documents}
    return {**columns, "checksum": _checksum(*columns.values())}


def from_sample(sample: dict, *, row_length: int, vocab_size: int) -> tuple[NDArray, NDArray, NDArray]:
    """(tokens, starts, documents) of an MDS sample, as stored and read-only. Raises ValueError if any was altered."""
    tokens, starts, documents = sample["tokens"], sample["starts"], sample["documents"]
    # MDS keeps a hash per shard, which costs reading all of it; a checksum per row costs a tenth of reading that row.
    if _checksum(tokens, starts, documents) != int(sample["checksum"]):
        raise ValueError("the row does not match its checksum")
    if tokens.shape != (row_length,) or starts.ndim != 1 or starts[0] != 0 or starts[-1] >= row_length:
        raise ValueError(f"not a row of {row_length} tokens")
    if documents.shape != starts.shape:
        raise ValueError(f"{starts.size} document starts, {documents.size} document numbers")
    if int(tokens.max()) >= vocab_size or (starts.size > 1 and not (starts[1:] > starts[:-1]).all()):
        raise ValueError(f"a token id is not under vocab_size {vocab_size}, or document starts do not ascend")
    return tokens, starts, documents


def _checksum(*arrays: NDArray) -> int:
    value = 0
    for array in arrays:
        value = zlib.crc32(array, value)
    return value
