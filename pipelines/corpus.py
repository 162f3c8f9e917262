"""Sources of text -> documents, one string each, in an order that depends on nothing but names and contents.

Every byte of a source either becomes part of a document or raises a CorpusError with file and line: a bad record is
never skipped in silence. Blank documents are the one exception, because they hold nothing to learn from. It refuses
unknown file kinds, missing fields, invalid JSON and invalid UTF-8.
"""

import glob
import gzip
import importlib.util
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pipelines.errors import CorpusError
from pipelines.king_james import demo_documents, king_james_file

KING_JAMES = "package:king-james"
_TEXT_KINDS = (".txt", ".text", ".md")
_COMPRESSED = (".gz", ".zst")
_ACCEPTED = f"use .jsonl, {', '.join(_TEXT_KINDS)}, each plain or with .gz or .zst, or the name {KING_JAMES}"

Sources = str | Path | list | tuple


class Corpus:
    """The documents of some sources; iterate as often as needed. `bytes_read` of `total_bytes` (on disk) is progress.

    sources: a path, or several. Each is a file, a folder (searched recursively, files in name order), a glob pattern,
        or the name `package:king-james`.
        - `.jsonl`: one JSON object a line, the document in `text_field`;
        - `.txt`, `.text`, `.md`: a file is one document; with `blank_line_documents`, each blank line ends one;
        - the same with `.gz` or `.zst` after it.
    Raises CorpusError: at once for a source that is missing, empty or of an unknown kind; while iterating for bad
    contents (with the line), and at the end if there was no document at all.
    """

    def __init__(self, sources: Sources, *, text_field: str = "text", blank_line_documents: bool = False):
        self.sources = [sources] if isinstance(sources, str | Path) else list(sources)
        self.text_field, self.blank_line_documents = text_field, blank_line_documents
        if not self.sources:
            raise CorpusError("no source of text was given", remedy=_ACCEPTED)
        self._files: list[Path | str] = [file for source in self.sources for file in _resolve(source)]
        self.total_bytes = sum((king_james_file() if f == KING_JAMES else f).stat().st_size for f in self._files)
        self.bytes_read = 0

    def __iter__(self) -> Iterator[str]:
        finished, empty = 0, True
        for file in self._files:
            if file == KING_JAMES:
                path, documents, position = king_james_file(), demo_documents(), None
            else:
                path = file
                documents, position = self._read(path)
            for document in documents:
                if position is not None:
                    self.bytes_read = finished + position()
                if document and not document.isspace():
                    empty = False
                    yield document
            finished += path.stat().st_size
            self.bytes_read = finished
        if empty:
            names = ", ".join(str(source) for source in self.sources)
            raise CorpusError(
                f"{names}: not one document with text in it", remedy="point at a corpus that is not empty"
            )

    def _read(self, path: Path):
        raw = path.open("rb")
        return self._documents(path, raw), lambda: 0 if raw.closed else raw.tell()

    def _documents(self, path: Path, raw: BinaryIO) -> Iterator[str]:
        with raw, _as_corpus_error(path), _decompressed(path, raw) as data:
            if _kind(path) == ".jsonl":
                yield from self._jsonl(path, data)
            elif self.blank_line_documents:
                yield from self._blank_line_documents(path, data)
            else:
                yield _decode(path, data.read(), first_line=1).removeprefix("\ufeff")

    def _jsonl(self, path: Path, lines: Iterable[bytes]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            text = _decode(path, line, first_line=number).removeprefix("\ufeff")
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except ValueError as error:
                raise CorpusError(
                    f"{path}, line {number}: not valid JSON ({error})", remedy="write one JSON object a line"
                ) from error
            if not isinstance(record, dict) or self.text_field not in record:
                found = f"fields {sorted(record)}" if isinstance(record, dict) else type(record).__name__
                raise CorpusError(
                    f"{path}, line {number}: no field {self.text_field!r} ({found})",
                    remedy="set text_field to the field that holds the text",
                )
            document = record[self.text_field]
            if not isinstance(document, str):
                raise CorpusError(
                    f"{path}, line {number}: field {self.text_field!r} is {type(document).__name__}, not text",
                    remedy="remove the record or set text_field to a field of strings",
                )
            try:
                document.encode()
            except UnicodeEncodeError as error:
                raise CorpusError(
                    f"{path}, line {number}: field {self.text_field!r} holds half of a surrogate pair ({error.reason})",
                    remedy="replace lone \\ud800-\\udfff escapes before preparing",
                ) from error
            yield document

    def _blank_line_documents(self, path: Path, lines: Iterable[bytes]) -> Iterator[str]:
        paragraph: list[str] = []
        for number, line in enumerate(lines, start=1):
            text = _decode(path, line, first_line=number)
            text = text.removeprefix("\ufeff") if number == 1 else text
            if text.strip():
                paragraph.append(text)
            elif paragraph:
                yield "".join(paragraph).rstrip("\r\n")
                paragraph = []
        if paragraph:
            yield "".join(paragraph).rstrip("\r\n")


def iter_documents(sources: Sources, *, text_field: str = "text", blank_line_documents: bool = False) -> Iterator[str]:
    """Yields the documents of `sources`; see Corpus for what a source may be and for the errors."""
    return iter(Corpus(sources, text_field=text_field, blank_line_documents=blank_line_documents))


def as_documents(documents_or_sources: Sources | Iterable[str], **options) -> Corpus | Iterable[str]:
    """A path, or a list or tuple of paths, is opened as a Corpus; any other iterable is taken to be the documents."""
    if isinstance(documents_or_sources, str | Path | list | tuple):
        return Corpus(documents_or_sources, **options)
    return documents_or_sources


def _resolve(source: str | Path) -> list[Path | str]:
    """The files of one source, in the order they are read."""
    name = str(source)
    if name == KING_JAMES:
        king_james_file()
        return [KING_JAMES]
    shown = name if len(name) <= 200 else name[:200] + "..."
    if name.startswith("package:"):
        raise CorpusError(f"source {shown!r}: no such packaged corpus", remedy=f"the one there is: {KING_JAMES}")
    if "://" in name:
        raise CorpusError(f"source {shown!r}: remote text is not read", remedy="copy it here first, then name the copy")
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if _kind(path) is None:
                raise CorpusError(f"source {shown!r}: unknown kind of file {path.suffix!r}", remedy=_ACCEPTED)
            return [path]
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = sorted(f for f in found if f.is_file() and _kind(f))
    except OSError as error:  # a name too long for the file system: somebody passed the text itself
        raise CorpusError(f"source {shown!r}: not a path ({error.strerror})", remedy=_ACCEPTED) from error
    if path.is_dir():  # .git, .cache and the like are not the corpus
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if not files:
        what = "a folder without text files" if path.is_dir() else "no such file, folder or match"
        raise CorpusError(f"source {shown!r}: {what}", remedy=_ACCEPTED)
    return files


def _kind(path: Path) -> str | None:
    """ ".jsonl", a text suffix, or None; what a compression suffix hides is looked at, not the suffix."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in (".jsonl", *_TEXT_KINDS) else None


def _decode(path: Path, data: bytes, *, first_line: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
        raise CorpusError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not valid UTF-8 ({error.reason})",
            remedy="convert the file to UTF-8 (iconv -t UTF-8)",
        ) from error


@contextmanager
def _decompressed(path: Path, raw: BinaryIO) -> Iterator[BinaryIO]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(raw) as data:
            yield data
    elif suffix == ".zst":
        if importlib.util.find_spec("zstandard"):  # reads in pieces; `zstd` below needs the whole file in memory
            import zstandard

            with io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)) as data:
                yield data
        elif importlib.util.find_spec("zstd"):
            import zstd

            try:
                data = zstd.decompress(raw.read())
            except zstd.Error as error:
                raise CorpusError(
                    f"{path}: cannot be decompressed ({error})",
                    remedy="check it with `zstd -t`; one without its size in the header needs: pip install zstandard",
                ) from error
            yield io.BytesIO(data)
        else:
            raise CorpusError(f"{path}: no library reads .zst here", remedy="pip install zstandard")
    else:
        yield raw


@contextmanager
def _as_corpus_error(path: Path) -> Iterator[None]:
    """Damage found while decompressing (truncated or garbled .gz) becomes a CorpusError that names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path}: cannot be read ({error})", remedy="restore the file, or leave it out") from error
