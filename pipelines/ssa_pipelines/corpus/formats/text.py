"""Plain text: the whole file is one document, or, with `blank_line_documents`, each part between blank lines.

The position of a part is that of the blank line before it, so a part belongs to exactly one range of positions.
"""

from collections.abc import Iterator

from ssa_pipelines.corpus.formats import FORMATS
from ssa_pipelines.corpus.formats.base import LineFormat, ReadOptions, TextStream, decode


@FORMATS.register(".txt", ".text", ".md")
class PlainText(LineFormat):
    @classmethod
    def is_splittable(cls, options: ReadOptions) -> bool:
        return options.blank_line_documents

    @classmethod
    def parse(cls, stream: TextStream, options: ReadOptions, end: int | None) -> Iterator[tuple[int, str]]:
        if options.blank_line_documents:
            return _paragraphs(stream, end)
        return iter([(0, decode(stream.whole(), 0).removeprefix("\ufeff"))])


def _paragraphs(stream: TextStream, end: int | None) -> Iterator[tuple[int, str]]:
    paragraph: list[str] = []
    border: int | None = None if stream.begin else 0  # position of the last blank line; None before the first one
    for position, line in stream.lines():
        if border is None and end is not None and position >= end:
            return  # the rest belongs to a later range; otherwise each range would read a file of no blank line to its end
        text = decode(line, position)
        text = text.removeprefix("\ufeff") if position == 0 else text
        if text.strip():
            if border is not None:
                paragraph.append(text)
        else:
            if paragraph and border is not None:
                yield border, "".join(paragraph).rstrip("\r\n")
                paragraph = []
            border = position
    if paragraph and border is not None:
        yield border, "".join(paragraph).rstrip("\r\n")
