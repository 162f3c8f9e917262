"""Names of text -> the list of files behind them, in an order that depends on nothing but the names.

A name is a file, a folder, a glob pattern, an `s3://` object, prefix or pattern, or a packaged corpus (`package:...`).
Several names may be given, and names may be grouped into named sources. It refuses names with nothing behind them, single
files of an unknown format, and text it would have to leave out: broken links, unreadable folders, other compressions.
"""

import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ssa_pipelines.corpus.compression import COMPRESSIONS, REFUSED
from ssa_pipelines.corpus.formats import FORMATS, PACKAGE, CorpusFormat
from ssa_pipelines.corpus.formats.base import InputFile
from ssa_pipelines.errors import CorpusError, DataError
from ssa_pipelines.storage import object_store as storage

Sources = str | Path | list | tuple
_SHOWN = 200  # characters of a name in a message: it may be the text itself


def named_sources(sources: Sources | Mapping[str, Sources]) -> dict[str, list[InputFile]]:
    """The files of each named source, in the order given; a single unnamed one is called "".

    Raises CorpusError for a name with nothing behind it, and for source names that cannot be folder names.
    """
    if not isinstance(sources, Mapping):
        return {"": input_files(sources)}
    for name in sources:
        if not isinstance(name, str) or not name or name[0] == "." or "/" in name or name in ("train", "validation"):
            problem = f"source name {name!r}: not usable as a folder name"
            raise CorpusError(problem, remedy="name it like web or code-2", id="source-name")
    if not sources:
        raise _nothing_given()
    return {name: input_files(names) for name, names in sources.items()}


def input_files(sources: Sources) -> list[InputFile]:
    """The files behind one name or several, in reading order. Raises CorpusError for a name with nothing behind it."""
    names = [sources] if isinstance(sources, str | Path) else list(sources)
    if not names:
        raise _nothing_given()
    files = [file for name in names for file in _resolve(name)]
    if len({file.name for file in files}) == len({file.path for file in files}):
        return files
    # en/part-0.jsonl and de/part-0.jsonl, given one by one: the ledger must not call both part-0.jsonl
    base = _folder_part(os.path.commonprefix([f.path for f in files]))  # noqa: RUF071 (URLs too; cut after a slash)
    return [replace(file, name=file.path.removeprefix(base)) for file in files]


def _resolve(source: str | Path) -> list[InputFile]:
    name = str(source)
    shown = name if len(name) <= _SHOWN else name[:_SHOWN] + "..."
    if name.startswith(PACKAGE):
        packaged = FORMATS.get(name)
        if packaged is None:
            known = ", ".join(name for name in FORMATS.names() if name.startswith(PACKAGE))
            raise CorpusError(
                f"source {shown!r}: no such packaged corpus", remedy=f"known: {known}", id="unknown-packaged-corpus"
            )
        path = packaged.locate()
        return [InputFile(str(path), name, path.stat().st_size, packaged)]
    if storage.is_remote(name):
        return _remote(name, shown)
    path = Path(name).expanduser()
    try:
        if path.is_file():
            _check_compression(name)
            if format_of(path.name) is None:
                problem = f"source {shown!r}: unknown kind of file {path.suffix!r}"
                raise CorpusError(problem, remedy=_accepted(), id="unknown-corpus-format")
            return [_local(path, path.name)]
        found = _walk(path) if path.is_dir() else _matches(str(path))
        files = sorted(set(found))
    except OSError as error:
        if error.filename and str(error.filename) != str(path):
            problem, remedy = f"{error.filename}: {error.strerror}", "make it readable, or move it away"
            raise CorpusError(problem, remedy=remedy, id="source-unreadable") from error
        problem = f"source {shown!r}: not a path ({error.strerror})"  # a name too long: somebody passed the text itself
        raise CorpusError(problem, remedy=_accepted(), id="source-not-a-path") from error
    base = path if path.is_dir() else Path(_literal_folder(str(path)))
    if not files:
        what = "a folder without text files" if path.is_dir() else "no such file, folder or match"
        raise CorpusError(f"source {shown!r}: {what}", remedy=_accepted(), id="source-missing")
    return [_local(f, os.path.relpath(f, base)) for f in files]


def _walk(folder: Path, inside: tuple[str, ...] = ()) -> Iterator[Path]:
    """The files of text below a folder, also through links, except a link to a folder that contains it.

    Hidden files and folders (.git, .cache) are left out.
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
    """The files of text that a pattern matches, and those below the folders that it matches."""
    for path in map(Path, glob.glob(pattern, recursive=True)):
        if path.is_dir():
            yield from _walk(path)
        elif _is_text(path):
            yield path


def _is_text(path: Path) -> bool:
    """Whether a file has a known format. Raises CorpusError for text that would be lost: a broken link, a compression."""
    _check_compression(str(path))
    if format_of(path.name) is None:
        return False
    if path.is_symlink() and not path.exists():
        problem = f"{path}: a link to {os.readlink(path)}, which does not exist"
        raise CorpusError(problem, remedy="restore the target, or remove the link", id="broken-link")
    return path.is_file()


def _check_compression(name: str) -> None:
    inner, suffix = os.path.splitext(name)
    kind = FORMATS.get(os.path.splitext(inner)[1].lower())
    if kind is None:
        return
    if suffix.lower() in REFUSED or (suffix.lower() in COMPRESSIONS and not kind.compressible):
        raise CorpusError(
            f"{name}: text in an unsupported compression",
            remedy="decompress it, or compress it with gzip or zstd (Parquet within itself), or name the other files by a glob",
            id="unsupported-compression",
        )


def _remote(name: str, shown: str) -> list[InputFile]:
    try:
        found = storage.find(name)
    except DataError as error:
        raise CorpusError(f"source {shown!r}: {error.problem}", remedy=error.remedy, id=error.id) from error
    files = []
    for stored in found:
        _check_compression(stored.name)
        if known := format_of(stored.name):
            files.append((stored, known))
    if not files:
        raise CorpusError(f"source {shown!r}: no text objects found", remedy=_accepted(), id="no-text-objects")
    is_pattern_or_file = files[0][0].name == name or "*" in name
    base = _literal_folder(name) if is_pattern_or_file else name.rstrip("/") + "/"
    return [InputFile(f.name, f.name.removeprefix(base), f.size, *known) for f, known in files]


def _local(path: Path, name: str) -> InputFile:
    known = format_of(path.name)
    assert known is not None, path  # the callers have filtered by format
    return InputFile(str(path), name, path.stat().st_size, *known)


def _literal_folder(pattern: str) -> str:
    """The part of a pattern before its first wildcard, cut after the last slash."""
    return _folder_part(pattern[: min((i for i in map(pattern.find, "*?[") if i >= 0), default=len(pattern))])


def _folder_part(name: str) -> str:
    return name[: name.rfind("/") + 1]


def format_of(name: str) -> tuple[type[CorpusFormat], str] | None:
    """(format, compression suffix) by the suffixes of a file name, or None for a file of no known format."""
    suffixes = [s.lower() for s in PurePosixPath(name).suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    found = FORMATS.get(suffixes[-1]) if suffixes else None
    if found is None or (compression and not found.compressible):
        return None
    return found, compression


def _nothing_given() -> CorpusError:
    return CorpusError("no source of text was given", remedy=_accepted(), id="no-source")


def _accepted() -> str:
    suffixes = [name for name in FORMATS.names() if not name.startswith(PACKAGE)]
    packages = [name for name in FORMATS.names() if name.startswith(PACKAGE)]
    return (
        f"use {', '.join(suffixes)} (text also with {' or '.join(COMPRESSIONS)}), or the name {' or '.join(packages)}"
    )
