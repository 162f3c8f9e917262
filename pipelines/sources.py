"""Names of text -> the list of files behind them, in an order that depends on nothing but the names.

A name is a file, a folder, a glob pattern, an `s3://` object, prefix or pattern, or `package:king-james`; several names
may be given, and names may be grouped into named sources. What the files are is decided here, by suffix; what is in them
by documents.py. It refuses names with nothing behind them and single files of an unknown kind.
"""

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipelines import storage
from pipelines.errors import CorpusError, DataError
from pipelines.king_james import king_james_file

KING_JAMES = "package:king-james"
TEXT_KINDS = (".txt", ".text", ".md")
KINDS = (".jsonl", ".parquet", *TEXT_KINDS)
COMPRESSIONS = (".gz", ".zst")
ACCEPTED = f"use .jsonl, .parquet, {', '.join(TEXT_KINDS)} (text also with .gz or .zst), or the name {KING_JAMES}"

Sources = str | Path | list | tuple


@dataclass(frozen=True)
class InputFile:
    """One file of text.

    path: where to read it. name: what records call it: its path below the name it was given by, so that a corpus that
    moves keeps its name. size: bytes as stored. kind: ".jsonl", ".parquet", ".txt" or KING_JAMES. compression: "",
    ".gz" or ".zst".
    """

    path: str
    name: str
    size: int
    kind: str
    compression: str = ""

    @property
    def seekable(self) -> bool:
        """Whether reading can begin in the middle without reading what comes before."""
        return not self.compression and self.kind in (".jsonl", ".txt")


def named_sources(sources: Sources | Mapping[str, Sources]) -> dict[str, list[InputFile]]:
    """The files of each named source, in the order given; a single unnamed one is called "".

    Raises CorpusError for a name with nothing behind it, and for source names that are no folder names.
    """
    if not isinstance(sources, Mapping):
        return {"": input_files(sources)}
    for name in sources:
        if (
            not isinstance(name, str)
            or not name
            or name.startswith(".")
            or "/" in name
            or name in ("train", "validation")
        ):
            raise CorpusError(f"source name {name!r}: not usable as a folder name", remedy="name it like web or code-2")
    if not sources:
        raise CorpusError("no source of text was given", remedy=ACCEPTED)
    return {name: input_files(names) for name, names in sources.items()}


def input_files(sources: Sources) -> list[InputFile]:
    """The files behind one name or several, in the order they are read. Raises CorpusError for names with nothing."""
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise CorpusError("no source of text was given", remedy=ACCEPTED)
    return [file for name in names for file in _resolve(name)]


def _resolve(source: str | Path) -> list[InputFile]:
    name = str(source)
    if name == KING_JAMES:
        return [_local(king_james_file(), KING_JAMES, KING_JAMES)]
    shown = name if len(name) <= 200 else name[:200] + "..."
    if name.startswith("package:"):
        raise CorpusError(f"source {shown!r}: no such packaged corpus", remedy=f"the one there is: {KING_JAMES}")
    if storage.is_remote(name):
        return _remote(name, shown)
    path = Path(name).expanduser()
    try:
        if path.is_file():
            if kind_of(path.name) is None:
                raise CorpusError(f"source {shown!r}: unknown kind of file {path.suffix!r}", remedy=ACCEPTED)
            return [_local(path, path.name)]
        found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        files = sorted(f for f in found if kind_of(f.name) and f.is_file())
    except OSError as error:  # a name too long for the file system: somebody passed the text itself
        raise CorpusError(f"source {shown!r}: not a path ({error.strerror})", remedy=ACCEPTED) from error
    base = path if path.is_dir() else Path(_literal_folder(str(path)))
    if path.is_dir():  # .git, .cache and the like are not the corpus
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
    if not files:
        what = "a folder without text files" if path.is_dir() else "no such file, folder or match"
        raise CorpusError(f"source {shown!r}: {what}", remedy=ACCEPTED)
    return [_local(f, os.path.relpath(f, base)) for f in files]


def _remote(name: str, shown: str) -> list[InputFile]:
    try:
        found = storage.find(name)
    except DataError as error:
        raise CorpusError(f"source {shown!r}: {error.problem}", remedy=error.remedy) from error
    files = [f for f in found if kind_of(f.name) and f.size]
    if not files:
        raise CorpusError(f"source {shown!r}: no object of text is there", remedy=ACCEPTED)
    base = _literal_folder(name) if files[0].name == name or name != name.split("*")[0] else name.rstrip("/") + "/"
    return [InputFile(f.name, f.name.removeprefix(base), f.size, *kind_of(f.name)) for f in files]


def _local(path: Path, name: str, kind: str | None = None) -> InputFile:
    kind, compression = (kind, "") if kind else kind_of(path.name)
    return InputFile(str(path), name, path.stat().st_size, kind, compression)


def _literal_folder(pattern: str) -> str:
    """The part of a pattern before its first wildcard, cut after the last slash."""
    literal = pattern[: min((i for i in map(pattern.find, "*?[") if i >= 0), default=len(pattern))]
    return literal[: literal.rfind("/") + 1]


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the suffixes of a file name, or None for a file that holds no text for us."""
    suffixes = [s.lower() for s in PurePosixPath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in KINDS or (suffix == ".parquet" and compression):
        return None
    return ".txt" if suffix in TEXT_KINDS else suffix, compression
