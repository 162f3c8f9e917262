"""Formats of corpus files: one module per format, found by file suffix or, for a packaged corpus, by source name."""

from ssa_pipelines.corpus.formats.base import CorpusFormat
from ssa_pipelines.registry import Registry

FORMATS: Registry[type[CorpusFormat]] = Registry(__name__)
PACKAGE = "package:"  # prefix of the names of packaged corpora

__all__ = ["FORMATS", "PACKAGE", "CorpusFormat"]
