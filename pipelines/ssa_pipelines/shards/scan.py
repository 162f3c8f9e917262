"""First pass over a corpus: every document is read, checked, counted and hashed before one is encoded.

Bad input is found in minutes instead of after hours of encoding; exact duplicates, the held-out documents and the cut of
the work into parts follow from the hashes and counts alone, never from the number of processes. It refuses a corpus
without a document.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.corpus.documents import Format, records
from ssa_pipelines.corpus.sources import InputFile
from ssa_pipelines.randomness import key64, mix64

TRAIN, VALIDATION, DUPLICATE = 0, 1, 2
_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
_TASK_FILES = 256  # small files scanned together


class Stretch(NamedTuple):
    """Records of one file whose place (see documents.records) is in [begin, end); None is the end of the file."""

    file: int
    begin: int
    end: int | None


class Counted(NamedTuple):
    """A stretch and what is in it: records (blank ones too), documents (not blank), their bytes as UTF-8."""

    stretch: Stretch
    records: int
    documents: int
    text_bytes: int


class ScanTask(NamedTuple):
    """Stretches to scan together: with the files they are in, and the stride at which they are counted."""

    number: int
    files: dict[int, InputFile]
    stretches: list[Stretch]
    form: Format
    stride: int


class Scanned(NamedTuple):
    """What a ScanTask found: stretches no longer than a stride, in order, and a hash of each document."""

    number: int
    counted: list[Counted]
    hashes: NDArray
    stored_bytes: int


def scan_tasks(files: list[InputFile], form: Format, stride: int) -> Iterator[ScanTask]:
    """Cuts files into tasks. A file that can be read from its middle is cut at every stride, another is one stretch."""
    number, stretches, size = 0, [], 0
    for index, file in enumerate(files):
        splits = file.seekable and (file.kind == ".jsonl" or form.blank_line_documents)
        begins = range(0, max(file.size, 1), stride) if splits else (0,)
        for begin in begins:
            stretches.append(Stretch(index, begin, begin + stride if splits else None))
            size += min(stride, file.size - begin) if splits else file.size
            if size >= stride or len(stretches) == _TASK_FILES:
                yield ScanTask(number, {s.file: files[s.file] for s in stretches}, stretches, form, stride)
                number, stretches, size = number + 1, [], 0
    if stretches:
        yield ScanTask(number, {s.file: files[s.file] for s in stretches}, stretches, form, stride)


def scan(task: ScanTask) -> Scanned:
    """Reads, counts and hashes; raises CorpusError for a record that cannot be used."""
    counted, hashes, stored = [], bytearray(), 0
    for stretch in task.stretches:
        file = task.files[stretch.file]
        steps = 1 if file.kind == ".parquet" else task.stride
        tallies: dict[int, list[int]] = {}  # by stride
        for place, text in records(file, task.form, stretch.begin, stretch.end):
            tally = tallies.setdefault(place // steps, [0, 0, 0])
            tally[0] += 1
            if text and not text.isspace():
                data = text.encode()
                hashes += hashlib.blake2b(data, digest_size=16).digest()
                tally[1] += 1
                tally[2] += len(data)
        for step, tally in sorted(tallies.items()):
            counted.append(Counted(Stretch(stretch.file, step * steps, (step + 1) * steps), *tally))
        stored += (min(stretch.end, file.size) if stretch.end else file.size) - stretch.begin
    return Scanned(task.number, counted, np.frombuffer(bytes(hashes), _HASH), stored)


def fates(hashes: NDArray, *, fraction: float, seed: int, deduplicate: bool) -> NDArray[np.uint8]:
    """What becomes of each document: TRAIN, VALIDATION or DUPLICATE; depends on the hashes and their order alone.

    Of equal documents the first stays. Held out are those whose hash, mixed with the seed, falls under the fraction, so
    that equal documents share a side even when none is removed. Needs about 40 bytes of memory a document.
    """
    found = np.full(len(hashes), TRAIN, np.uint8)
    if fraction:
        found[mix64(hashes["low"] ^ key64(seed)) < np.uint64(fraction * 2**64)] = VALIDATION
    if deduplicate and len(hashes):
        order = np.lexsort((hashes["low"], hashes["high"]))  # stable: equal hashes stay in the corpus's order
        again = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        found[again] = DUPLICATE
    return found


def digest(parts: Iterable[NDArray]) -> str:
    """sha256 over the hashes of all documents in order: what says that a corpus is the same one."""
    sha256 = hashlib.sha256()
    for hashes in parts:
        sha256.update(hashes.tobytes())
    return sha256.hexdigest()
