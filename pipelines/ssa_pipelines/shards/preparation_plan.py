"""The plan of one preparation: the job all steps share, and the cut of its work into parts.

The cut follows only from the counts of the first pass, so the bytes written depend neither on the number of processes nor
on which of them died.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.corpus.formats.base import InputFile, ReadOptions
from ssa_pipelines.errors import DatasetError
from ssa_pipelines.shards import scan
from ssa_pipelines.shards.packing import NO_DOCUMENT
from ssa_pipelines.shards.parts import Layout, Part
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.tokenizer import Tokenizer

Progress = Callable[[str, int, int | None], None]
PART_BYTES = 64 << 20  # of text; enough for a full shard
_COMPRESSED_PARTS = 16  # at most per compressed file: each part decompresses it from the beginning
_BYTES_PER_WORKER = 16 << 20  # of text; for less, starting a process costs more than it saves


class Job(NamedTuple):
    """What all steps of one preparation share."""

    out: str
    tokenizer: Tokenizer
    layout: Layout
    options: ReadOptions
    settings: dict
    part_bytes: int | None
    workers: int | None
    progress: Progress | None

    def processes(self, work: int) -> int:
        """Number of processes for `work` bytes of text."""
        return self.workers or min(len(os.sched_getaffinity(0)), 1 + work // _BYTES_PER_WORKER)


class Scanned(NamedTuple):
    """A source after the first pass. hashes: one per document. labels: [documents], see scan.split_labels."""

    files: list[InputFile]
    counted: list[scan.Counted]
    hashes: NDArray
    labels: NDArray[np.uint8]

    @property
    def documents(self) -> int:
        return len(self.hashes)


def inputs_of(settings: dict, source: Scanned) -> dict:
    return {**settings, "documents": source.documents, "documents_sha256": scan.digest([source.hashes])}


def below(out: str | Path, name: str) -> str:
    return storage.join(out, name) if name else str(out)


def plan_parts(job: Job, name: str, source: Scanned, scratch: Path, model: str) -> Iterator[Part]:
    """Cuts a source into parts of about equal text. Raises DatasetError for more records than row numbers can count."""
    total = sum(c.text_bytes for c in source.counted)
    target = job.part_bytes or max(min(PART_BYTES, max(total // 64, 1 << 20)), total // 8192)
    group: list[tuple[scan.Counted, int]] = []
    number = first_record = first_document = size = documents = 0
    in_file: dict[int, int] = {}
    for c in source.counted:
        in_file[c.stretch.file] = in_file.get(c.stretch.file, 0) + c.text_bytes

    def part() -> Part:
        labels = source.labels[first_document : first_document + documents]
        hashes = source.hashes[first_document : first_document + documents]
        return Part(
            number=number,
            folder=str(scratch / "parts" / f"{name or 'part'}-{number:06d}"),
            upload=storage.join(below(job.out, name), "train") if storage.is_remote(job.out) else None,
            tokenizer=model,
            layout=job.layout,
            options=job.options,
            files={c.stretch.file: source.files[c.stretch.file] for c, _ in group},
            stretches=[c.stretch for c, _ in group],
            first_records=[first for _, first in group],
            labels=labels.tobytes(),
            digest=scan.digest([hashes]),
            text_bytes=size,
        )

    for counted in source.counted:
        group.append((counted, first_record))
        first_record += counted.records
        size += counted.text_bytes
        documents += counted.documents
        compressed = bool(source.files[counted.stretch.file].compression)
        least = max(target, in_file[counted.stretch.file] // _COMPRESSED_PARTS) if compressed else target
        if size >= least:
            yield part()
            number, first_document, documents, size, group = number + 1, first_document + documents, 0, 0, []
    if group:
        yield part()
    if first_record >= NO_DOCUMENT:
        raise DatasetError(
            f"{name or 'the corpus'}: {first_record:,} records, at most {NO_DOCUMENT:,} are possible in one source",
            remedy="split it into several named sources",
            id="too-many-records",
        )
