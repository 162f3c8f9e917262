"""Which documents a step saw: from a position of the run back to the files and records its rows were made of.

A run writes nothing for this. The order is a function of the position, each row holds the numbers of its documents, and
records.json maps numbers to files.
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
    """Yields the contents of rows begin .. begin + count - 1 of the run, over all ranks.

    Each is {"position", "source", "dataset", "epoch", "row", "documents": [{"document", "file", "record", "begin", "end"},
    ...]}. record: the document's number, from 0, among all records of its file (for JSON lines, the line number minus one).
    [begin, end): its tokens in the row. Raises ShardError for a row that cannot be read.
    """
    files = {name: _Files(info.path / RECORDS_NAME) for name, info in stream.infos.items()}
    origins, rows = stream.row_origins(begin, count), stream.rows.read(begin, count)
    for position, origin, (tokens, starts, numbers) in zip(range(begin, begin + count), origins, rows, strict=True):
        ends = [*starts.tolist()[1:], tokens.size]
        documents = [
            {"document": number, **files[origin.source].find(number), "begin": start, "end": end}
            for number, start, end in zip(numbers.tolist(), starts.tolist(), ends, strict=True)
            if number != NO_DOCUMENT
        ]
        fingerprint = stream.infos[origin.source].fingerprint
        yield {"position": position, **origin._asdict(), "dataset": fingerprint, "documents": documents}


class _Files:
    """The files of one source, found by record number."""

    def __init__(self, path: Path):
        table = json.loads(path.read_text())
        self._names = [name for name, _ in table]
        self._begins = [0, *accumulate(records for _, records in table)]

    def find(self, number: int) -> dict:
        at = bisect_right(self._begins, number) - 1
        return {"file": self._names[at], "record": number - self._begins[at]}
