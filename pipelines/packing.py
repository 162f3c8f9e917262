"""Documents -> rows of one fixed length, and a row's form on disk.

Every token lands in exactly one row, in order, and only the last row is padded; for each token the row says where its
own document begins, so attention never has to look across a border. It refuses token ids outside the vocabulary.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError, TokenizerError


class PackedRow(NamedTuple):
    """One row.

    tokens: [row_length], uint16 or uint32.
    starts: [documents], uint16 or uint32, ascending from 0: the index at which each document of the row begins.
    padding: number of padding tokens at the end. Each is an eos token and a document of its own, so that it takes part
        in nothing: it attends to itself alone and predicts nothing.
    """

    tokens: NDArray
    starts: NDArray
    padding: int


class Packer:
    """Fills rows with documents, each as bos + tokens + eos.

    A document that crosses the end of a row goes on at the start of the next one as a document of its own, without a
    second bos: its context is what the row holds of it.
    """

    def __init__(self, row_length: int, *, bos_id: int, eos_id: int, vocab_size: int):
        if row_length < 2:
            raise DataError(
                f"row_length {row_length}: a row of one token has nothing to predict", remedy="use 2 or more"
            )
        self.row_length, self.bos_id, self.eos_id, self.vocab_size = row_length, bos_id, eos_id, vocab_size
        self._token_dtype, self._start_dtype = smallest_dtype(vocab_size), smallest_dtype(row_length)
        self._begin_row()

    def add(self, tokens: Sequence[int]) -> list[PackedRow]:
        """Appends one document; returns the rows that became full. Raises TokenizerError for an id >= vocab_size."""
        document = np.empty(len(tokens) + 2, np.int64)
        document[0], document[1:-1], document[-1] = self.bos_id, tokens, self.eos_id
        if document.min() < 0 or document.max() >= self.vocab_size:
            wrong = next(int(t) for t in document if not 0 <= t < self.vocab_size)
            raise TokenizerError(
                f"token id {wrong} is outside the vocabulary (vocab_size {self.vocab_size})",
                remedy="encode with the tokenizer this dataset is prepared for",
            )
        rows = []
        while document.size:
            room = self.row_length - self._filled
            part, document = document[:room], document[room:]
            self._starts.append(self._filled)
            self._tokens[self._filled : self._filled + part.size] = part
            self._filled += part.size
            if self._filled == self.row_length:
                rows.append(self._end_row(padding=0))
        return rows

    def finish(self) -> list[PackedRow]:
        """The last, padded row, or none when the documents end with a row."""
        if not self._filled:
            return []
        self._starts.extend(range(self._filled, self.row_length))
        self._tokens[self._filled :] = self.eos_id
        return [self._end_row(padding=self.row_length - self._filled)]

    def _begin_row(self) -> None:
        self._tokens = np.empty(self.row_length, self._token_dtype)
        self._starts: list[int] = []
        self._filled = 0

    def _end_row(self, padding: int) -> PackedRow:
        row = PackedRow(self._tokens, np.array(self._starts, self._start_dtype), padding)
        self._begin_row()
        return row


def pack(
    documents: Iterable[Sequence[int]], row_length: int, *, bos_id: int, eos_id: int, vocab_size: int
) -> Iterator[PackedRow]:
    """Packs documents (token ids without bos and eos) into rows; see Packer."""
    packer = Packer(row_length, bos_id=bos_id, eos_id=eos_id, vocab_size=vocab_size)
    for document in documents:
        yield from packer.add(document)
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
        "checksum": "uint32",
    }


def to_sample(row: PackedRow) -> dict:
    """The MDS sample of a row."""
    return {"tokens": row.tokens, "starts": row.starts, "checksum": _checksum(row.tokens, row.starts)}


def from_sample(sample: dict, *, row_length: int, vocab_size: int) -> tuple[NDArray, NDArray]:
    """(tokens, starts) of an MDS sample, as stored and read-only. Raises ValueError if any of it was altered."""
    tokens, starts = sample["tokens"], sample["starts"]
    # MDS keeps a hash per shard, which costs reading all of it; a checksum per row costs a tenth of reading that row.
    if _checksum(tokens, starts) != int(sample["checksum"]):
        raise ValueError("the row does not match its checksum")
    if tokens.shape != (row_length,) or starts.ndim != 1 or starts[0] != 0 or starts[-1] >= row_length:
        raise ValueError(f"not a row of {row_length} tokens")
    if int(tokens.max()) >= vocab_size or (starts.size > 1 and not (starts[1:] > starts[:-1]).all()):
        raise ValueError(f"a token id is not under vocab_size {vocab_size}, or document starts do not ascend")
    return tokens, starts


def _checksum(tokens: NDArray, starts: NDArray) -> int:
    return zlib.crc32(starts.tobytes(), zlib.crc32(tokens.tobytes()))
