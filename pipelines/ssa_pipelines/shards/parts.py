"""Second pass over a corpus: encodes and packs one part of it into MDS shards, on any process.

A part is fixed by the corpus alone and committed by one rename, so parts can be done in any order and are done once. It
leaves unfilled rows and held-out documents to the last step (finish.py). It refuses text that changed since the first pass.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.corpus.formats.base import InputFile, ReadOptions
from ssa_pipelines.errors import CorpusError
from ssa_pipelines.shards.packing import PackedRow, Packer, marked, mds_columns, smallest_dtype, to_sample
from ssa_pipelines.shards.scan import DUPLICATE, TRAIN, Stretch
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.tokenizer import Tokenizer, cached_tokenizer

SPLITS = ("train", "validation")  # by the labels TRAIN and VALIDATION of scan.py
_BATCH_CHARACTERS = 1 << 20  # documents are encoded about a megabyte at a time
_LONG_CHARACTERS = 4 << 20
_COUNTED = 1 << 20  # tokens counted at once: numpy needs 8 bytes for each
_RECORD = "part.json"


class Layout(NamedTuple):
    """How rows and shards are written."""

    row_length: int
    compression: str | None
    shard_size: int


class Part(NamedTuple):
    """One unit of work: consecutive stretches of one source, and the label of each document in them.

    folder: of the result. upload: the URL its shards go to, or None. first_records: per stretch the number of its first
    record in the source. labels: one byte per document (scan.split_labels). digest: of the documents' hashes.
    """

    number: int
    folder: str
    upload: str | None
    tokenizer: str
    layout: Layout
    options: ReadOptions
    files: dict[int, InputFile]
    stretches: list[Stretch]
    first_records: list[int]
    labels: bytes
    digest: str
    text_bytes: int


class Tally:
    """Counts of one split: documents, their bytes and tokens, lengths by power of two, and token frequencies."""

    def __init__(self, vocab_size: int):
        self.documents = self.text_bytes = self.tokens = 0
        self.lengths = np.zeros(64, np.int64)
        self.frequencies = np.zeros(vocab_size, np.int64)

    def add(self, tokens: NDArray, text_bytes: int) -> None:
        self.documents += 1
        self.text_bytes += text_bytes
        self.tokens += tokens.size
        self.lengths[int(tokens.size - 1).bit_length()] += 1
        for begin in range(0, tokens.size, _COUNTED):
            np.add.at(self.frequencies, tokens[begin : begin + _COUNTED], 1)

    def merge(self, other: "Tally") -> None:
        for name in ("documents", "text_bytes", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.lengths += other.lengths
        self.frequencies += other.frequencies


class ShardWriter:
    """Rows -> MDS shards `shard.PPPPP.KKKKK.mds` of part P in a folder. Each name is unique in a dataset."""

    def __init__(self, folder: Path, part: int, layout: Layout, vocab_size: int):
        self._folder, self._part, self._layout = folder, part, layout
        self._columns = mds_columns(layout.row_length, vocab_size)
        self._writer: Any = None
        self.rows = self.padding = 0

    def write(self, rows: list[PackedRow]) -> None:
        for row in rows:
            if self._writer is None:
                from streaming import MDSWriter  # seconds to import

                self._writer = MDSWriter(
                    columns=self._columns,
                    out=str(self._folder / ".mds"),  # must be an empty folder
                    compression=self._layout.compression,
                    hashes=["sha256"],
                    size_limit=self._layout.shard_size,
                    max_workers=1,
                )
            self._writer.write(to_sample(row))
            self.rows += 1
            self.padding += row.padding

    def finish(self) -> list[dict]:
        """Writes the last shard; returns the entries of all shards for index.json."""
        if self._writer is None:
            return []
        self._writer.finish()
        written = self._folder / ".mds"
        shards: list[dict] = json.loads((written / "index.json").read_text())["shards"]
        for number, shard in enumerate(shards):
            for data in filter(None, (shard["raw_data"], shard["zip_data"])):
                old, suffix = data["basename"], data["basename"].split(".", 2)[2]
                data["basename"] = f"shard.{self._part:05d}.{number:05d}.{suffix}"
                if (written / old).exists():  # a compressed shard has only the compressed file
                    (written / old).rename(self._folder / data["basename"])
        shutil.rmtree(written)
        return shards

    def close(self) -> None:
        """Ends the threads of MDSWriter, also after an error."""
        if self._writer is not None:
            self._writer.cancel_future_jobs()


class Finished:
    """The result of a part, read from its folder: entries of its shards, counts, and documents still to be packed."""

    def __init__(self, folder: Path, vocab_size: int):
        self.folder = folder
        record = json.loads((folder / _RECORD).read_text())
        self.digest, self.rows, self.shards = record["digest"], record["rows"], record["shards"]
        self.tallies = {}
        for split in SPLITS:
            self.tallies[split] = tally = Tally(vocab_size)
            tally.__dict__.update(record["tallies"][split])
            with np.load(folder / f"{split}.npz") as saved:
                tally.lengths, tally.frequencies = saved["lengths"], saved["frequencies"]

    def leftovers(self, split: str) -> Iterator[tuple[NDArray, int]]:
        """(tokens, document) of documents, or ends of one, that are not in a row yet. One is in memory at a time."""
        with np.load(self.folder / f"{split}.npz") as saved:
            sizes, documents, dtype = saved["sizes"], saved["documents"], saved["token_type"].dtype
        with open(self.folder / f"{split}.tokens", "rb") as file:
            for size, document in zip(sizes.tolist(), documents.tolist(), strict=True):
                yield np.frombuffer(file.read(size * dtype.itemsize), dtype), document


def encode_part(part: Part) -> str:
    """Does the part unless it is done; returns its folder. Raises CorpusError, TokenizerError, DatasetError, OSError."""
    folder = Path(part.folder)
    tokenizer = cached_tokenizer(part.tokenizer)
    if _is_done(folder, part.digest):
        return part.folder
    temporary = folder.with_name(f".{folder.name}")
    for old in (folder, temporary):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    writer = ShardWriter(temporary, part.number, part.layout, tokenizer.vocab_size)
    packer = Packer(part.layout.row_length, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
    tallies = {split: Tally(tokenizer.vocab_size) for split in SPLITS}
    held_out: list[tuple[int, int]] = []
    try:
        with open(temporary / "validation.tokens", "wb") as validation:
            for tokens, document, text_bytes, label in _encoded(part, tokenizer):
                tallies[SPLITS[label]].add(tokens, text_bytes)
                if label == TRAIN:
                    writer.write(packer.add(tokens, document))
                else:
                    validation.write(tokens.data)
                    held_out.append((tokens.size, document))
        shards = writer.finish()
    finally:
        writer.close()
    unfinished = packer.unfinished()
    (temporary / "train.tokens").write_bytes(b"".join(tokens.tobytes() for tokens, _ in unfinished))
    left = {"train": [(tokens.size, document) for tokens, document in unfinished], "validation": held_out}
    for split in SPLITS:
        sizes, documents = np.array(left[split], np.int64).reshape(-1, 2).T
        np.savez_compressed(
            temporary / f"{split}.npz",
            sizes=sizes,
            documents=documents,
            token_type=np.empty(0, smallest_dtype(tokenizer.vocab_size)),
            lengths=tallies[split].lengths,
            frequencies=tallies[split].frequencies,
        )
    if part.upload:
        for shard in shards:
            name = (shard["zip_data"] or shard["raw_data"])["basename"]
            storage.upload(temporary / name, storage.join(part.upload, name))
            (temporary / name).unlink()
    counts = {
        split: {name: getattr(tally, name) for name in ("documents", "text_bytes", "tokens")}
        for split, tally in tallies.items()
    }
    record = {"digest": part.digest, "rows": writer.rows, "shards": shards, "tallies": counts}
    (temporary / _RECORD).write_text(json.dumps(record))
    for path in (*temporary.iterdir(), temporary):
        storage.fsync(path)
    temporary.rename(folder)
    return part.folder


def _encoded(part: Part, tokenizer: Tokenizer) -> Iterator[tuple[NDArray, int, int, int]]:
    """(tokens with marks, document number, bytes of text, label) of each document that is kept."""
    marks = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
    texts: list[str] = []
    about: list[tuple[int, int, int]] = []
    characters = 0

    def encode() -> Iterator[tuple[NDArray, int, int, int]]:
        for ids, (document, size, label) in zip(tokenizer.encode(texts), about, strict=True):
            yield marked(ids, **marks), document, size, label

    for text, document, size, label in _kept(part):
        if len(text) > _LONG_CHARACTERS:
            yield from encode()
            texts, about, characters = [], [], 0
            yield marked(tokenizer.encode_long(text), **marks), document, size, label
            continue
        texts.append(text)
        about.append((document, size, label))
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield from encode()
            texts, about, characters = [], [], 0
    yield from encode()


def _kept(part: Part) -> Iterator[tuple[str, int, int, int]]:
    """(text, document number, bytes, label) of the documents that are kept; checks that they are those of the first pass."""
    hashes, seen = hashlib.sha256(), 0
    for stretch, first in zip(part.stretches, part.first_records, strict=True):
        file = part.files[stretch.file]
        for number, (_, text) in enumerate(file.records(part.options, stretch.begin, stretch.end), start=first):
            if not text or text.isspace():
                continue
            data = text.encode()
            hashes.update(hashlib.blake2b(data, digest_size=16).digest())
            label = part.labels[seen] if seen < len(part.labels) else DUPLICATE
            seen += 1
            size = len(data)
            del data  # as large as the text, which may be a whole book
            if label != DUPLICATE:
                yield text, number, size, label
    if hashes.hexdigest() != part.digest:
        names = ", ".join(sorted({file.path for file in part.files.values()})[:3])
        problem, remedy = (
            f"{names}: changed while it was being prepared",
            "leave the corpus as it is and run the command again",
        )
        raise CorpusError(problem, remedy=remedy, id="corpus-changed")


def _is_done(folder: Path, digest: str) -> bool:
    try:
        return bool(json.loads((folder / _RECORD).read_text())["digest"] == digest)
    except (OSError, ValueError, KeyError):
        return False
