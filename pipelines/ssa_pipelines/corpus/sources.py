"""Names of text -> the list of files behind them, in an order that depends on nothing but the names.

A name is a file, a folder, a glob pattern, an `s3://` object, prefix or pattern, or `package:king-james`; several names
may be given, and names may be grouped into named sources. What the files are is decided here, by suffix; what is in them
by documents.py. It refuses names with nothing behind them, single files of an unknown kind, and text that it would have
to leave out: links to nothing, folders it may not list, compressions it cannot read.
"""

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from ssa_pipelines.corpus.king_james import king_james_file
from ssa_pipelines.errors import CorpusError, DataError
from ssa_pipelines.storage import object_store as storage

KING_JAMES = "package:king-james"
TEXT_KINDS = (".txt", ".text", ".md")
KINDS = (".jsonl", ".parquet", *TEXT_KINDS)
COMPRESSIONS = (".gz", ".zst")
_NOT_READ = (".bz2", ".xz", ".lzma", ".lz4", ".br", ".sz", ".snappy", ".zip", ".7z")
ACCEPTED = f"use .jsonl, .parquet, {', '.join(TEXT_KINDS)} (text also with .gz or .zst), or the name {KING_JAMES}"

Sources = str | Path | list | tuple


@dataclass(frozen=True)
class InputFile:
    """One file of text.

    path: where to read it. name: what records call it: its path below the name it was given by, so that a corpus that
    moves keeps its name; below the folder that holds all files where two would have the same. size: bytes as stored.
    kind: ".jsonl", ".parquet", ".txt" or KING_JAMES. compression: "", ".gz" or ".zst".
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
    files = [file for name in names for file in _resolve(name)]
    if len({file.name for file in files}) == len({file.path for file in files}):
        return files
    # en/part-0.jsonl and de/part-0.jsonl, given one by one: the ledger must not call both part-0.jsonl
    base = _folder_part(os.path.commonprefix([f.path for f in files]))  # noqa: RUF071 (URLs too; cut after a slash)
    return [replace(file, name=file.path.removeprefix(base)) for file in files]


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
            _check_compression(name)
            if kind_of(path.name) is None:
                raise CorpusError(f"source {shown!r}: unknown kind of file {path.suffix!r}", remedy=ACCEPTED)
            return [_local(path, path.name)]
        found = _walk(path) if path.is_dir() else _matches(str(path))
        files = sorted(set(found))
    except OSError as error:  # a name too long for the file system: somebody passed the text itself
        if error.filename and str(error.filename) != str(path):
            raise CorpusError(
                f"{error.filename}: {error.strerror}", remedy="make it readable, or move it away"
            ) from error
        raise CorpusError(f"source {shown!r}: not a path ({error.strerror})", remedy=ACCEPTED) from error
    base = path if path.is_dir() else Path(_literal_folder(str(path)))
    if not files:
        what = "a folder without text files" if path.is_dir() else "no such file, folder or match"
        raise CorpusError(f"source {shown!r}: {what}", remedy=ACCEPTED)
    return [_local(f, os.path.relpath(f, base)) for f in files]


def _walk(folder: Path, inside: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files of text below a folder, through links too, but for a link to a folder it lies in.

    .git, .cache and the like are not the corpus.
    """
    own = os.path.realpath(folder)
    if own in inside:
        return
    for entry in os.scandir(folder):
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(path, (*inside, own))
        elif _is_text(path):
            yield path


def _matches(pattern: str) -> Iterator[Path]:
    """The files of text that a pattern matches, and those below the folders that it matches, as a shell would give them."""
    for path in map(Path, glob.glob(pattern, recursive=True)):
        if path.is_dir():
            yield from _walk(path)
        elif _is_text(path):
            yield path


def _is_text(path: Path) -> bool:
    """Whether a file is text for us. Raises CorpusError for text that would be lost: a link to nothing, a compression."""
    _check_compression(str(path))
    if kind_of(path.name) is None:
        return False
    if path.is_symlink() and not path.exists():
        raise CorpusError(
            f"{path}: a link to {os.readlink(path)}, which is not there", remedy="restore it, or remove the link"
        )
    return path.is_file()


def _check_compression(name: str) -> None:
    inner, suffix = os.path.splitext(name)
    kind = os.path.splitext(inner)[1].lower()
    if (kind in KINDS and suffix.lower() in _NOT_READ) or (kind == ".parquet" and suffix.lower() in COMPRESSIONS):
        raise CorpusError(
            f"{name}: text in a compression that is not read here",
            remedy="decompress it, or compress it with gzip or zstd (Parquet within itself), or name the other files by a glob",
        )


def _remote(name: str, shown: str) -> list[InputFile]:
    try:
        found = storage.find(name)
    except DataError as error:
        raise CorpusError(f"source {shown!r}: {error.problem}", remedy=error.remedy) from error
    for stored in found:
        _check_compression(stored.name)
    files = [f for f in found if kind_of(f.name)]
    if not files:
        raise CorpusError(f"source {shown!r}: no object of text is there", remedy=ACCEPTED)
    base = _literal_folder(name) if files[0].name == name or name != name.split("*")[0] else name.rstrip("/") + "/"
    return [InputFile(f.name, f.name.removeprefix(base), f.size, *kind_of(f.name)) for f in files]


def _local(path: Path, name: str, kind: str | None = None) -> InputFile:
    kind, compression = (kind, "") if kind else kind_of(path.name)
    return InputFile(str(path), name, path.stat().st_size, kind, compression)


def _literal_folder(pattern: str) -> str:
    """The part of a pattern before its first wildcard, cut after the last slash."""
    return _folder_part(pattern[: min((i for i in map(pattern.find, "*?[") if i >= 0), default=len(pattern))])


def _folder_part(name: str) -> str:
    return name[: name.rfind("/") + 1]


def kind_of(name: str) -> tuple[str, str] | None:
    """(kind, compression) by the suffixes of a file name, or None for a file that holds no text for us."""
    suffixes = [s.lower() for s in PurePosixPath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    suffix = suffixes[-1] if suffixes else ""
    if suffix not in KINDS or (suffix == ".parquet" and compression):
        return None
    return ".txt" if suffix in TEXT_KINDS else suffix, compression
