"""What a corpus format is: documents of a file, each with its position, read from any position on.

Consecutive ranges of positions yield every record exactly once, wherever they are cut; several processes can share a file.
A bad record raises a CorpusError with file and line and is never skipped.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, NamedTuple

from ssa_pipelines.corpus.compression import opened
from ssa_pipelines.errors import CorpusError

_CHUNK = 1 << 20  # bytes decompressed at a time on the way to a position


class ReadOptions(NamedTuple):
    """How documents are found in a file.

    text_field: field of a JSON record, or column of a table, that holds the text.
    blank_line_documents: blank lines of a text file separate documents; otherwise the file is one document.
    """

    text_field: str = "text"
    blank_line_documents: bool = False


class CorpusFormat(ABC):
    """One format. Classes are registered under file suffixes (".jsonl") or a package name ("package:king-james").

    compressible: files may carry a compression suffix in addition. bytes_are_positions: positions are byte offsets after
    decompression, so that documents can be counted per stretch of bytes; otherwise each position counts by itself.
    """

    compressible: ClassVar[bool] = False
    bytes_are_positions: ClassVar[bool] = True

    @classmethod
    @abstractmethod
    def records(cls, file: "InputFile", options: ReadOptions, begin: int, end: int | None) -> Iterator[tuple[int, str]]:
        """(position, text) of the records whose position is in [begin, end), blank ones included. Raises CorpusError."""

    @classmethod
    def is_splittable(cls, options: ReadOptions) -> bool:
        """Whether an uncompressed file may be cut at any byte and the pieces read separately."""
        return False

    @classmethod
    def locate(cls) -> Path:
        """The file behind a packaged corpus. Raises CorpusError when its package is not installed."""
        raise CorpusError(
            f"{cls.__name__} is registered as a packaged corpus, but does not locate its file",
            remedy="define `locate` in its class, or register it under a file suffix",
            id="packaged-corpus-without-file",
        )


@dataclass(frozen=True)
class InputFile:
    """One file of text.

    path: where to read it. name: what records call it: its path below the name it was given by, so that a corpus that
    moves keeps its name; below the common folder of all files where two would have the same name. size: bytes as stored.
    compression: suffix of its compression, "" for none.
    """

    path: str
    name: str
    size: int
    format: type[CorpusFormat]
    compression: str = ""

    def records(self, options: ReadOptions, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, str]]:
        """(position, text) of each record whose position is in [begin, end), blank ones included. Raises CorpusError."""
        return self.format.records(self, options, begin, end)

    def is_splittable(self, options: ReadOptions) -> bool:
        """Whether reading can begin in the middle without reading what comes before."""
        return not self.compression and self.format.is_splittable(options)


class BadRecord(Exception):
    """What is wrong with the record at byte `position`; becomes a CorpusError that counts the lines."""

    def __init__(self, position: int, problem: str, *, remedy: str, id: str):
        super().__init__(problem)
        self.position, self.id, self.remedy = position, id, remedy


class TextStream(NamedTuple):
    """The bytes of an open file, decompressed, to be read from the first line that begins at `begin` or later."""

    file: InputFile
    data: BinaryIO
    begin: int

    def whole(self) -> bytes:
        """Everything, in one piece."""
        return self.data.read()

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(position, line) of each line."""
        position = 0
        if self.begin:
            position = self.begin - 1  # a line that begins exactly at `begin` belongs here: skip to the newline before
            if self.file.compression:
                left = position
                while left and (skipped := len(self.data.read(min(left, _CHUNK)))):
                    left -= skipped
            else:
                self.data.seek(position)
            position += len(self.data.readline())
        for line in self.data:
            size, held = len(line), [line]
            del line  # it may be a whole book: the caller must be able to free it
            yield position, held.pop()
            position += size


class LineFormat(CorpusFormat):
    """Base of formats whose positions are byte offsets in text, plain or compressed.

    Raises CorpusError with the line number for a BadRecord of `parse`.
    """

    compressible = True

    @classmethod
    @abstractmethod
    def parse(cls, stream: TextStream, options: ReadOptions, end: int | None) -> Iterator[tuple[int, str]]:
        """(position, text) of the records in a stream; those from `end` on may be left out. Raises BadRecord."""

    @classmethod
    def records(cls, file: InputFile, options: ReadOptions, begin: int, end: int | None) -> Iterator[tuple[int, str]]:
        with opened(file.path, file.compression, file.size) as data:
            try:
                for position, text in cls.parse(TextStream(file, data, begin), options, end):
                    if end is not None and position >= end:
                        return
                    yield position, text
            except BadRecord as bad:
                line = _line_of(file, bad.position)
                raise CorpusError(f"{file.path}, line {line}: {bad}", remedy=bad.remedy, id=bad.id) from bad.__cause__


def decode(data: bytes, position: int) -> str:
    """UTF-8 bytes that begin at `position` of the file as text. Raises BadRecord."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadRecord(
            position + error.start,
            f"byte 0x{data[error.start]:02x} is not valid UTF-8 ({error.reason})",
            remedy="convert the file to UTF-8 (iconv -t UTF-8)",
            id="corpus-not-utf8",
        ) from error


def _line_of(file: InputFile, position: int) -> int:
    """The number, from 1, of the line that holds byte `position`. Reads the file again: counting always would be slow."""
    newlines = 0
    with opened(file.path, file.compression, file.size) as data:
        while position > 0 and (chunk := data.read(min(_CHUNK, position))):
            newlines += chunk.count(b"\n")
            position -= len(chunk)
    return newlines + 1
