"""First pass over a corpus: every document is read, checked, counted and hashed before one is encoded.

Bad input is found in minutes instead of after hours of encoding. Exact duplicates, held-out documents and the cut into parts
follow from the hashes and counts alone, never from the number of processes.
"""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.corpus.formats.base import InputFile, ReadOptions
from ssa_pipelines.randomness import key64, mix64

TRAIN, VALIDATION, DUPLICATE = 0, 1, 2
_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
_TASK_FILES = 256  # small files scanned together


class Stretch(NamedTuple):
    """Records of one file whose position (see CorpusFormat) is in [begin, end); None is the end of the file."""

    file: int
    begin: int
    end: int | None


class Counted(NamedTuple):
    """A stretch and its counts: records (blank ones included), documents (not blank), their bytes as UTF-8."""

    stretch: Stretch
    records: int
    documents: int
    text_bytes: int


class ScanTask(NamedTuple):
    """Stretches to scan together, with their files by number, and the stride in bytes at which they are counted."""

    number: int
    files: dict[int, InputFile]
    stretches: list[Stretch]
    options: ReadOptions
    stride: int


class Scanned(NamedTuple):
    """The result of a ScanTask: stretches no longer than a stride, in order, and a 128-bit hash per document."""

    number: int
    counted: list[Counted]
    hashes: NDArray
    stored_bytes: int


def scan_tasks(files: list[InputFile], options: ReadOptions, stride: int) -> Iterator[ScanTask]:
    """Cuts files into tasks. A splittable file is cut at every stride, another is one stretch."""
    number, size = 0, 0
    stretches: list[Stretch] = []
    for index, file in enumerate(files):
        splits = file.is_splittable(options)
        begins = range(0, max(file.size, 1), stride) if splits else range(1)
        for begin in begins:
            stretches.append(Stretch(index, begin, begin + stride if splits else None))
            size += min(stride, file.size - begin) if splits else file.size
            if size >= stride or len(stretches) == _TASK_FILES:
                yield ScanTask(number, {s.file: files[s.file] for s in stretches}, stretches, options, stride)
                number, stretches, size = number + 1, [], 0
    if stretches:
        yield ScanTask(number, {s.file: files[s.file] for s in stretches}, stretches, options, stride)


def scan(task: ScanTask) -> Scanned:
    """Reads, counts and hashes. Raises CorpusError for a record that cannot be used."""
    counted: list[Counted] = []
    hashes, stored = bytearray(), 0
    for stretch in task.stretches:
        file = task.files[stretch.file]
        stride = task.stride if file.format.bytes_are_positions else 1
        tallies: dict[int, list[int]] = {}  # by stride
        for position, text in file.records(task.options, stretch.begin, stretch.end):
            tally = tallies.setdefault(position // stride, [0, 0, 0])
            tally[0] += 1
            if text and not text.isspace():
                data = text.encode()
                hashes += hashlib.blake2b(data, digest_size=16).digest()
                tally[1] += 1
                tally[2] += len(data)
        for step, tally in sorted(tallies.items()):
            counted.append(Counted(Stretch(stretch.file, step * stride, (step + 1) * stride), *tally))
        stored += (min(stretch.end, file.size) if stretch.end else file.size) - stretch.begin
    return Scanned(task.number, counted, np.frombuffer(bytes(hashes), _HASH), stored)


def split_labels(hashes: NDArray, *, fraction: float, seed: int, deduplicate: bool) -> NDArray[np.uint8]:
    """TRAIN, VALIDATION or DUPLICATE per document: uint8 [documents]. Depends only on the hashes and their order.

    The first of equal documents is kept. A document is held out when its hash, mixed with the seed, is under the fraction,
    so equal documents are in the same split even if none is removed. Needs about 40 bytes of memory per document.
    """
    found = np.full(len(hashes), TRAIN, np.uint8)
    if fraction:
        found[mix64(hashes["low"] ^ key64(seed)) < np.uint64(fraction * 2**64)] = VALIDATION
    if deduplicate and len(hashes):
        order = np.lexsort((hashes["low"], hashes["high"]))  # stable: equal hashes stay in the order of the corpus
        repeated = order[1:][hashes[order[1:]] == hashes[order[:-1]]]
        found[repeated] = DUPLICATE
    return found


def digest(parts: Iterable[NDArray]) -> str:
    """sha256 over the hashes of all documents in order: equal only for equal corpora."""
    sha256 = hashlib.sha256()
    for hashes in parts:
        sha256.update(hashes.tobytes())
    return sha256.hexdigest()
