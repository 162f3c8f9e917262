"""Documents -> rows of one fixed length, and the MDS sample of a row.

Every token is in exactly one row, in order, and only the last row is padded. A row records where each of its documents
begins, so attention stays inside a document, and their numbers in the corpus. It refuses token ids outside the vocabulary.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import DatasetError, TokenizerError

NO_DOCUMENT = (1 << 32) - 1  # the document number of padding


class PackedRow(NamedTuple):
    """One row.

    tokens: [row_length], uint16 or uint32.
    starts: [documents], uint16 or uint32, ascending from 0: the index at which each document of the row begins.
    documents: [documents], uint32: the number of each document, by which the ledger finds it in the corpus.
    padding: number of padding tokens at the end. Each is an eos token and a document by itself, so it attends only to
        itself and predicts nothing.
    """

    tokens: NDArray
    starts: NDArray
    documents: NDArray[np.uint32]
    padding: int


class Packer:
    """Fills rows with documents, one after the other.

    A document that crosses the end of a row continues in the next one as a separate document, without a second bos. Its
    context is only what that row holds of it.
    """

    def __init__(self, row_length: int, *, eos_id: int, vocab_size: int):
        check_row_length(row_length)
        self.row_length, self.eos_id = row_length, eos_id
        self._token_dtype, self._start_dtype = smallest_dtype(vocab_size), smallest_dtype(row_length)
        self._begin_row()

    def add(self, tokens: NDArray, document: int) -> list[PackedRow]:
        """Appends one document with its marks (see `marked`); returns the rows that became full."""
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
        """(tokens, document) of the unfinished row. Another packer continues from it when they are added there."""
        ends = [*self._starts[1:], self._filled]
        pieces = zip(self._starts, ends, self._documents, strict=False)
        return [(self._tokens[start:end], document) for start, end, document in pieces]

    def finish(self) -> list[PackedRow]:
        """The last, padded row; none when the documents end exactly with a row."""
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


def check_row_length(row_length: int) -> None:
    """Raises DatasetError for rows that are too short."""
    if row_length < 2:
        problem = f"row_length {row_length}: a row of one token has nothing to predict"
        raise DatasetError(problem, remedy="use 2 or more", id="row-length")


def marked(tokens: Sequence[int] | NDArray, *, bos_id: int, eos_id: int, vocab_size: int) -> NDArray:
    """bos + tokens + eos in the dtype of rows: [tokens + 2]. Raises TokenizerError for an id outside the vocabulary."""
    ids = np.asarray(tokens, None if len(tokens) else np.int64)  # a given array is not copied: it may be a whole book
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        wrong = next(int(t) for t in ids if not 0 <= t < vocab_size)
        raise TokenizerError(
            f"token id {wrong} is outside the vocabulary (vocab_size {vocab_size})",
            remedy="encode with the tokenizer this dataset is prepared for",
            id="encoded-token-outside-vocabulary",
        )
    document = np.empty(ids.size + 2, smallest_dtype(vocab_size))
    document[0], document[1:-1], document[-1] = bos_id, ids, eos_id
    return document


def pack(
    documents: Iterable[Sequence[int]], row_length: int, *, bos_id: int, eos_id: int, vocab_size: int
) -> Iterator[PackedRow]:
    """Packs documents (token ids without bos and eos), numbered from 0, into rows. See Packer."""
    packer = Packer(row_length, eos_id=eos_id, vocab_size=vocab_size)
    for number, document in enumerate(documents):
        yield from packer.add(marked(document, bos_id=bos_id, eos_id=eos_id, vocab_size=vocab_size), number)
    yield from packer.finish()


def doc_starts(starts: NDArray, row_length: int) -> NDArray[np.int32]:
    """Per token the index of its document's first token, from a row's `starts`: int32 [row_length]."""
    starts = starts.astype(np.int32)
    return np.repeat(starts, np.diff(starts, append=np.int32(row_length)))


def smallest_dtype(values: int) -> np.dtype:
    """uint16 if the numbers 0..values-1 fit, else uint32."""
    return np.dtype(np.uint16 if values <= 1 << 16 else np.uint32)


def mds_columns(row_length: int, vocab_size: int) -> dict[str, str]:
    """The MDS columns of a row. A fixed shape for `tokens` reads twice as fast as a variable one."""
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
    """(tokens, starts, documents) of an MDS sample, read-only, as stored. Raises ValueError if one was altered."""
    tokens, starts, documents = sample["tokens"], sample["starts"], sample["documents"]
    # The sha256 of MDS covers a whole shard, which would have to be read; a CRC per row costs a tenth of reading the row.
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
        value = zlib.crc32(array.data, value)
    return value
