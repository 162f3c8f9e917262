"""What one preparation is to do: the job all steps share, and the cut of its work into parts.

The cut follows from what the first pass counted and from nothing else, so that the bytes written depend on neither the
number of processes nor on which of them died.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.corpus.documents import Format
from ssa_pipelines.corpus.sources import InputFile
from ssa_pipelines.errors import DatasetError
from ssa_pipelines.shards import scan
from ssa_pipelines.shards.packing import NO_DOCUMENT
from ssa_pipelines.shards.parts import Layout, Part
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.tokenizer.sentencepiece_tokenizer import Tokenizer

Progress = Callable[[str, int, int | None], None]
PART_BYTES = 64 << 20  # of text; enough for a full shard
_PIECES = 16  # a compressed file is decompressed from its beginning for each of its parts, so it has this many at most
_BYTES_A_WORKER = 16 << 20  # of text; below, starting a process costs more than it brings


class Job(NamedTuple):
    """What all steps of one preparation share."""

    out: str
    tokenizer: Tokenizer
    layout: Layout
    form: Format
    settings: dict
    part_bytes: int | None
    workers: int | None
    progress: Progress | None

    def processes(self, work: int) -> int:
        """How many processes for so many bytes of text; starting one for less than _BYTES_A_WORKER brings nothing."""
        return self.workers or min(len(os.sched_getaffinity(0)), 1 + work // _BYTES_A_WORKER)


class Scanned(NamedTuple):
    """A source after the first pass."""

    files: list[InputFile]
    counted: list[scan.Counted]
    hashes: NDArray
    fates: NDArray[np.uint8]

    @property
    def documents(self) -> int:
        return len(self.hashes)


def inputs_of(settings: dict, source: Scanned) -> dict:
    return {**settings, "documents": source.documents, "documents_sha256": scan.digest([source.hashes])}


def below(out: str | Path, name: str) -> str:
    return storage.join(out, name) if name else str(out)


def plan_parts(job: Job, name: str, source: Scanned, scratch: Path, model: str) -> Iterator[Part]:
    """Cuts a source into parts of about equal text, by what the first pass counted."""
    total = sum(c.text_bytes for c in source.counted)
    target = job.part_bytes or max(min(PART_BYTES, max(total // 64, 1 << 20)), total // 8192)
    group: list[tuple[scan.Counted, int]] = []
    number = first_record = first_document = size = documents = 0
    in_file: dict[int, int] = {}
    for c in source.counted:
        in_file[c.stretch.file] = in_file.get(c.stretch.file, 0) + c.text_bytes

    def part() -> Part:
        fates = source.fates[first_document : first_document + documents]
        hashes = source.hashes[first_document : first_document + documents]
        return Part(
            number=number,
            folder=str(scratch / "parts" / f"{name or 'part'}-{number:06d}"),
            upload=storage.join(below(job.out, name), "train") if storage.is_remote(job.out) else None,
            tokenizer=model,
            layout=job.layout,
            form=job.form,
            files={c.stretch.file: source.files[c.stretch.file] for c, _ in group},
            stretches=[c.stretch for c, _ in group],
            first_records=[first for _, first in group],
            fates=fates.tobytes(),
            digest=scan.digest([hashes]),
            text_bytes=size,
        )

    for counted in source.counted:
        group.append((counted, first_record))
        first_record += counted.records
        size += counted.text_bytes
        documents += counted.documents
        compressed = bool(source.files[counted.stretch.file].compression)
        least = max(target, in_file[counted.stretch.file] // _PIECES) if compressed else target
        if size >= least:
            yield part()
            number, first_document, documents, size, group = number + 1, first_document + documents, 0, 0, []
    if group:
        yield part()
    if first_record >= NO_DOCUMENT:
        raise DatasetError(
            f"{name or 'the corpus'}: {first_record:,} records, {NO_DOCUMENT:,} is the most in one source",
            remedy="cut it into several named sources",
        )
