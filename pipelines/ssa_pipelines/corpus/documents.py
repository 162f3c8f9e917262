"""Sources -> documents, one string each, in the order of the files and of the records in them.

Every byte of a file becomes part of a document or raises a CorpusError with file and line. Only blank documents are left
out, because they hold nothing to learn from.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from ssa_pipelines.corpus.formats.base import ReadOptions
from ssa_pipelines.corpus.sources import Sources, input_files
from ssa_pipelines.errors import CorpusError


def iter_documents(sources: Sources, *, text_field: str = "text", blank_line_documents: bool = False) -> Iterator[str]:
    """The documents of `sources` (see sources.py for what they may be), without blank ones.

    text_field, blank_line_documents: see ReadOptions.
    Raises CorpusError: at once for a source that does not exist; while iterating for bad contents, with file and line; and
    at the end if there was no document at all.
    """
    files, options = input_files(sources), ReadOptions(text_field, blank_line_documents)

    def documents() -> Iterator[str]:
        empty = True
        for file in files:
            for _, document in file.records(options):
                if document and not document.isspace():
                    empty = False
                    yield document
        if empty:
            raise no_document(sources)

    return documents()


def as_documents(documents_or_sources: Sources | Iterable[str], *, text_field: str = "text") -> Iterable[str]:
    """The documents of names of text (a name, or a list or tuple of names), or any other iterable of documents itself."""
    if isinstance(documents_or_sources, str | Path | list | tuple):
        return iter_documents(documents_or_sources, text_field=text_field)
    return documents_or_sources


def no_document(sources: object) -> CorpusError:
    """The error for sources that hold only blank documents."""
    names = list(sources) if isinstance(sources, list | tuple) else [sources]
    problem = f"{', '.join(map(str, names))}: not one document with text in it"
    return CorpusError(problem, remedy="point at a corpus that is not empty", id="corpus-empty")
