"""Which documents a step saw: from a position of the run back to the files and records its rows were made of.

Nothing is written for this while a run goes on: the order is a function of the position, each row holds the numbers of its
documents, and records.json says which file a number lies in.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

from ssa_pipelines.shards.dataset import RECORDS_NAME
from ssa_pipelines.shards.packing import NO_DOCUMENT
from ssa_pipelines.stream.train_stream import TrainStream


def read_ledger(stream: TrainStream, begin: int, count: int) -> Iterator[dict]:
    """For each of the rows begin .. begin + count - 1 of the run, over all ranks, what is in it.

    Yields {"position", "source", "dataset", "epoch", "row", "documents": [{"document", "file", "record", "begin", "end"},
    ...]}: record is the document's number, from 0, among all records of its file (for JSON lines: the line less one), and
    [begin, end) are its tokens in the row. Raises ShardError for a row that cannot be read.
    """
    files = {name: _Files(info.path / RECORDS_NAME) for name, info in stream.infos.items()}
    places, rows = stream.places(begin, count), stream.rows.read(begin, count)
    for position, place, (tokens, starts, numbers) in zip(range(begin, begin + count), places, rows, strict=True):
        ends = [*starts.tolist()[1:], tokens.size]
        documents = [
            {"document": number, **files[place.source].find(number), "begin": start, "end": end}
            for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True)
            if number != NO_DOCUMENT
        ]
        fingerprint = stream.infos[place.source].fingerprint
        yield {"position": position, **place._asdict(), "dataset": fingerprint, "documents": documents}


class _Files:
    """The files of one source, by the numbers of their records."""

    def __init__(self, path: Path):
        table = json.loads(path.read_text())
        self._names = [name for name, _ in table]
        self._begins = [0, *accumulate(records for _, records in table)]

    def find(self, number: int) -> dict:
        at = bisect_right(self._begins, number) - 1
        return {"file": self._names[at], "record": number - self._begins[at]}
