"""A corpus from which a small model learns to look facts up: scripture with the needle's facts in it, each said again later.

`python -m tests.evaluation.recall OUT.jsonl [DOCUMENTS]` writes it; the README of evaluation/ shows what a model trained on it
retrieves. The same arguments write the same bytes.
"""

import json
import random
import sys
from pathlib import Path

from pipelines import demo_documents
from ssa_megatron.evaluation.needle import FACT, NAMES, WORDS


def document(draw: random.Random, verses: list[str]) -> str:
    """About 450 tokens: five facts in random order, each said two to four times, a piece of a verse between."""
    facts = [
        f"{FACT.format(name=name)} {word}."
        for name, word in zip(draw.sample(NAMES.split(), 5), draw.sample(WORDS.split(), 5), strict=True)
    ]
    said = [fact for fact in facts for _ in range(draw.randint(2, 4))]
    draw.shuffle(said)
    lines = []
    for fact in said:
        piece = draw.choice(verses)
        lines += [fact, piece[: draw.randint(40, 160)]]
    return "\n".join(lines)


def main(out: str, count: str = "6000") -> None:
    draw = random.Random(0)
    verses = [line for chapter in demo_documents() for line in chapter.split("\n")[1:] if len(line) > 40]
    with Path(out).open("w", encoding="utf-8") as file:
        for _ in range(int(count)):
            file.write(json.dumps({"text": document(draw, verses)}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
