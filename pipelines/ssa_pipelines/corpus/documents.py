"""Files of text -> documents, one string each, in the order of the files and of the records in them.

Every byte of a file either becomes part of a document or raises a CorpusError with file and line: a bad record is never
skipped in silence. Blank documents are the one exception, because they hold nothing to learn from. A file can be read
from any place in it, so that several processes can share one. It refuses missing fields, invalid JSON, invalid UTF-8.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ssa_pipelines.corpus.king_james import demo_documents
from ssa_pipelines.corpus.sources import KING_JAMES, InputFile, Sources, input_files
from ssa_pipelines.errors import CorpusError
from ssa_pipelines.storage.object_store import ACCESS, is_remote, open_binary

_SKIP = 1 << 20  # bytes decompressed and dropped at a time


class Format(NamedTuple):
    """How files are cut into documents: the field of JSON and Parquet records, and what a text file holds."""

    text_field: str = "text"
    blank_line_documents: bool = False


class _BadRecord(Exception):
    """What is wrong with the record that begins at byte `place`; becomes a CorpusError that counts the lines."""

    def __init__(self, place: int, problem: str, remedy: str):
        super().__init__(problem)
        self.place, self.remedy = place, remedy


def iter_documents(sources: Sources, *, text_field: str = "text", blank_line_documents: bool = False) -> Iterator[str]:
    """The documents of `sources` (see sources.py for what they may be), blank ones left out.

    text_field: of `.jsonl` records (one JSON object a line) and `.parquet` rows, the field that holds the text.
    blank_line_documents: a text file is one document; with this, each blank line in it ends one.
    Raises CorpusError: at once for a source that is none; while iterating for bad contents, with file and line; and at
    the end if there was no document at all.
    """
    files, form = input_files(sources), Format(text_field, blank_line_documents)

    def documents():
        empty = True
        for file in files:
            for _, document in records(file, form):
                if document and not document.isspace():
                    empty = False
                    yield document
        if empty:
            raise no_document(sources)

    return documents()


def as_documents(documents_or_sources: Sources | Iterable[str], **options) -> Iterable[str]:
    """A name, or a list or tuple of names, is read as sources; any other iterable is taken to be the documents."""
    if isinstance(documents_or_sources, str | Path | list | tuple):
        return iter_documents(documents_or_sources, **options)
    return documents_or_sources


def no_document(sources: object) -> CorpusError:
    """The error of sources that are all blank."""
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    return CorpusError(
        f"{', '.join(map(str, names))}: not one document with text in it", remedy="point at a corpus that is not empty"
    )


def records(file: InputFile, form: Format, begin: int = 0, end: int | None = None) -> Iterator[tuple[int, str]]:
    """(place, text) of each record whose place is in [begin, end); blank records come too, as blank text.

    The place is the byte (after decompression) at which a record begins: a JSON line, a whole text file (0), or, for
    documents between blank lines, the last blank line before. Of a Parquet file it is the row group. So consecutive
    ranges yield each record exactly once, wherever they are cut.
    """
    if file.kind == KING_JAMES:
        yield from ((0, chapter) for chapter in demo_documents())
    elif file.kind == ".parquet":
        yield from _parquet(file, form, begin, end)
    else:
        with _opened(file) as data:
            try:
                if file.kind == ".jsonl":
                    found = _jsonl(_lines_from(file, data, begin), form.text_field)
                elif form.blank_line_documents:
                    found = _paragraphs(_lines_from(file, data, begin), begin, end)
                else:
                    found = iter([(0, _decode(data.read(), 0).removeprefix("\ufeff"))])
                for place, text in found:
                    if end is not None and place >= end:
                        return
                    yield place, text
            except _BadRecord as bad:
                line = _line_of(file, bad.place)
                raise CorpusError(f"{file.path}, line {line}: {bad}", remedy=bad.remedy) from bad.__cause__


def _lines_from(file: InputFile, data: BinaryIO, begin: int) -> Iterator[tuple[int, bytes]]:
    """(place, line) of the lines that begin at `begin` or later."""
    place = 0
    if begin:
        place = begin - 1  # the line that begins at `begin` is ours, so what precedes it is read to its newline
        if file.seekable:
            data.seek(place)
        else:
            left = place
            while left and (skipped := len(data.read(min(left, _SKIP)))):
                left -= skipped
        place += len(data.readline())
    for line in data:
        size, held = len(line), [line]
        del line  # it may be a book, which whoever asked may drop
        yield place, held.pop()
        place += size


def _jsonl(lines: Iterator[tuple[int, bytes]], field: str) -> Iterator[tuple[int, str]]:
    for place, line in lines:
        text = _decode(line, place).removeprefix("\ufeff")
        del line  # as large as the text, and so is what it was parsed from
        if not text.strip():
            yield place, ""
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:  # lists in lists a thousand deep
            raise _BadRecord(place, f"not valid JSON ({error})", "write one JSON object a line") from error
        if not isinstance(record, dict) or field not in record:
            found = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
            raise _BadRecord(place, f"no field {field!r} ({found})", "set text_field to the field that holds the text")
        document = record[field]
        if not isinstance(document, str):
            raise _BadRecord(
                place,
                f"field {field!r} is {type(document).__name__}, not text",
                "remove the record or set text_field to a field of strings",
            )
        if "\\ud" in text or "\\uD" in text:  # only an escape can hide half of a surrogate pair
            try:
                document.encode()
            except UnicodeEncodeError as error:
                raise _BadRecord(
                    place,
                    f"field {field!r} holds half of a surrogate pair ({error.reason})",
                    "replace lone \\ud800-\\udfff escapes before preparing",
                ) from error
        held = [document]
        del text, record, document
        yield place, held.pop()


def _paragraphs(lines: Iterator[tuple[int, bytes]], begin: int, end: int | None) -> Iterator[tuple[int, str]]:
    paragraph: list[str] = []
    border: int | None = None if begin else 0  # place of the blank line before; None until the first one is met
    for place, line in lines:
        if border is None and end is not None and place >= end:
            return  # what follows belongs to a later range; without this, each would read a file of no blank line to its end
        text = _decode(line, place)
        text = text.removeprefix("\ufeff") if place == 0 else text
        if text.strip():
            if border is not None:
                paragraph.append(text)
        else:
            if paragraph:
                yield border, "".join(paragraph).rstrip("\r\n")
                paragraph = []
            border = place
    if paragraph:
        yield border, "".join(paragraph).rstrip("\r\n")


def _parquet(file: InputFile, form: Format, begin: int, end: int | None) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    field, remedy = form.text_field, "set text_field to the column that holds the text"
    try:
        with open_binary(file.path) as data, parquet.ParquetFile(data) as table:
            column = table.schema_arrow.get_field_index(field)
            if column < 0:
                raise CorpusError(f"{file.path}: no column {field!r} ({table.schema_arrow.names})", remedy=remedy)
            kind = table.schema_arrow.field(column).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
                raise CorpusError(f"{file.path}: column {field!r} is {kind}, not text", remedy=remedy)
            last = table.num_row_groups if end is None else min(end, table.num_row_groups)
            for group in range(begin, last):
                for batch in table.iter_batches(256, row_groups=[group], columns=[field], use_threads=False):
                    yield from ((group, text or "") for text in batch.column(0).to_pylist())
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: InputFile, error: Exception) -> CorpusError:
    remedy = "restore the file, or leave it out"
    if is_remote(file.path) and type(error) is OSError:  # the store's trouble, not the file's
        remedy = ACCESS
    return CorpusError(f"{file.path}: cannot be read ({error})", remedy=remedy)


def _decode(data: bytes, place: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _BadRecord(
            place + error.start,
            f"byte 0x{data[error.start]:02x} is not valid UTF-8 ({error.reason})",
            "convert the file to UTF-8 (iconv -t UTF-8)",
        ) from error


def _line_of(file: InputFile, place: int) -> int:
    """The number, from 1, of the line that holds byte `place`; the file is read again, since nobody counted."""
    newlines = 0
    with _opened(file) as data:
        while place > 0 and (chunk := data.read(min(_SKIP, place))):
            newlines += chunk.count(b"\n")
            place -= len(chunk)
    return newlines + 1


@contextmanager
def _opened(file: InputFile) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; any damage found on the way becomes a CorpusError that names it."""
    faults: tuple[type[Exception], ...] = (OSError, EOFError, zlib.error)
    if file.compression == ".zst":
        from backports import zstd  # says when a file ends too early; `zstandard` and `zstd` end it in silence

        faults += (zstd.ZstdError,)
    try:
        with open_binary(file.path) as raw:
            if file.compression == ".gz":
                if not file.size:  # which Python reads as no text; no compressor writes it
                    raise EOFError("it is empty, and even compressed nothing takes 20 bytes")
                with gzip.open(raw) as data:
                    yield data
            elif file.compression == ".zst":
                with zstd.open(raw) as data:
                    yield data
            else:
                yield raw
    except faults as error:
        raise _unreadable(file, error) from error
