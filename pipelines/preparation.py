"""Corpus + tokenizer -> a dataset folder: packed rows in MDS shards, split into train and validation, described once.

The folder appears complete or not at all, and equal inputs give equal bytes. It refuses to write over anything, a
second writer for the same folder, and splits that would be empty.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipelines.corpus import Corpus, Sources, as_documents
from pipelines.dataset import FILE_NAME, FORMAT, TOKENIZER_NAME, load_dataset_info, to_json, with_fingerprint
from pipelines.errors import CorpusError, DatasetError, DatasetMismatch
from pipelines.packing import Packer, mds_columns, smallest_dtype, to_sample
from pipelines.tokenizer import Tokenizer

Progress = Callable[[int, int | None], None]
_BATCH_CHARACTERS = 1 << 20  # documents are encoded about a megabyte at a time


def prepare(
    sources: Sources | Iterable[str],
    tokenizer: Tokenizer | str | Path,
    out: str | Path,
    *,
    row_length: int,
    validation_fraction: float = 0.005,
    seed: int = 0,
    text_field: str = "text",
    blank_line_documents: bool = False,
    compression: str | None = None,
    shard_size: int = 64 << 20,
    threads: int | None = None,
    reuse: bool = False,
    progress: Progress | None = None,
) -> dict:
    """Encodes, packs and writes a corpus; returns `dataset.json` as a dict, plus "path" and "reused".

    sources: as for Corpus, or any other iterable of documents (strings).
    row_length: tokens in a row; the dataset fits training at exactly this length.
    validation_fraction: share of the documents held out. Which ones depends on `seed` and each document's text alone,
        so exact duplicates stay on one side.
    compression: None, or streaming's "zstd:LEVEL", "gz:LEVEL", ...: such shards are decompressed in place on first use.
    shard_size: most bytes in a shard, uncompressed.
    threads: for the tokenizer, by default one a core; the result does not depend on it.
    reuse: return the dataset at `out` if it was made from these very inputs (the corpus is read to be sure).
    progress: called with (bytes of the sources read, bytes in all); documents and None for an iterable of documents.
    Raises CorpusError, TokenizerError, DatasetError (something is at `out`, or another process writes it) or
    DatasetMismatch (reuse, but other inputs).
    """
    out = Path(out)
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    settings = {
        "row_length": row_length,
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "compression": compression,
        "shard_size": shard_size,
    }
    _check_settings(settings, tokenizer)
    documents = as_documents(sources, text_field=text_field, blank_line_documents=blank_line_documents)
    if out.exists() or out.is_symlink():
        return _existing(out, documents, settings, reuse)
    try:
        threads = threads or len(os.sched_getaffinity(0))
        with _private_folder(out) as folder:
            record = _write(documents, tokenizer, folder, settings, threads, progress)
            _commit(folder, out)
    except OSError as error:  # what concerns the corpus is a CorpusError by now
        raise DatasetError(
            f"{out}: cannot be written ({error})", remedy="free disk space, or name another folder"
        ) from error
    return {**record, "path": str(out), "reused": False}


def _check_settings(settings: dict, tokenizer: Tokenizer) -> None:
    from streaming.base.compression import is_compression

    row_length, fraction, compression = (settings[k] for k in ("row_length", "validation_fraction", "compression"))
    if row_length < 2:
        raise DatasetError(
            f"row_length {row_length}: a row of one token has nothing to predict", remedy="use 2 or more"
        )
    if not 0 <= fraction < 1:
        raise DatasetError(f"validation_fraction {fraction} is not in [0, 1)", remedy="0.005 holds out 0.5 %")
    if compression is not None and not is_compression(compression):
        raise DatasetError(f"compression {compression!r} is not known", remedy="use None or zstd:3")
    least = row_length * (smallest_dtype(tokenizer.vocab_size).itemsize + smallest_dtype(row_length).itemsize) + 4096
    if not least <= settings["shard_size"] < 1 << 32:
        raise DatasetError(
            f"shard_size {settings['shard_size']}: a shard takes {least} to {(1 << 32) - 1} bytes at this row_length",
            remedy="leave it at 64 MiB",
        )


def _existing(out: Path, documents: Iterable[str], settings: dict, reuse: bool) -> dict:
    if not reuse:
        raise DatasetError(f"{out}: already exists", remedy="name another folder, remove this one, or pass reuse=True")
    info = load_dataset_info(out)
    digest = _DocumentDigest()
    if all(info.inputs.get(field) == value for field, value in settings.items()):
        for document in documents:
            digest.add(document)
    wanted = {**settings, "documents": digest.count, "documents_sha256": digest.hexdigest()}
    for field, value in wanted.items():
        if info.inputs.get(field) != value:
            raise DatasetMismatch(
                f"{out}: {field} is {info.inputs.get(field)} in the dataset there, {value} was asked for",
                remedy="name another folder, or remove this one to have it prepared anew",
            )
    return {**to_json(info), "path": str(out), "reused": True}


def _write(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    folder: Path,
    settings: dict,
    threads: int,
    progress: Progress | None,
) -> dict:
    """Writes all of the dataset into `folder` and returns its record."""
    fraction, key = settings["validation_fraction"], str(settings["seed"]).encode()[:64]
    digest = _DocumentDigest()
    splits = {name: _SplitWriter(folder / name, tokenizer, settings) for name in ("train", "validation")}
    try:
        for batch in _batches(documents):
            for text, tokens in zip(batch, tokenizer.encode(batch, threads=threads), strict=True):
                data = digest.add(text)
                number = int.from_bytes(hashlib.blake2b(data, key=key, digest_size=8).digest(), "big")
                splits["validation" if number < fraction * 2**64 else "train"].add(tokens, len(data))
            if progress:
                known = isinstance(documents, Corpus)
                progress(documents.bytes_read if known else digest.count, documents.total_bytes if known else None)
        if not splits["train"].documents or (fraction and not splits["validation"].documents):
            empty = "validation" if splits["train"].documents else "train"
            raise CorpusError(
                f"validation_fraction {fraction} of {digest.count} documents leaves the {empty} split empty",
                remedy="give more documents, another seed or fraction; validation_fraction=0 makes no validation split",
            )
        written = {name: writer.finish() for name, writer in splits.items() if writer.documents}
    finally:
        for writer in splits.values():
            writer.close()
    train, validation = splits["train"].counts, splits["validation"].counts
    record = with_fingerprint(
        {
            "format": FORMAT,
            "row_length": settings["row_length"],
            "vocab_size": tokenizer.vocab_size,
            "token_dtype": str(smallest_dtype(tokenizer.vocab_size)),
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "unigram_entropy": _cross_entropy(train, train),
            "validation_unigram_cross_entropy": _cross_entropy(validation, train + 1) if validation.any() else None,
            "splits": written,
            "inputs": {**settings, "documents": digest.count, "documents_sha256": digest.hexdigest()},
        }
    )
    (folder / TOKENIZER_NAME).write_bytes(tokenizer.model)
    (folder / FILE_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    return record


class _SplitWriter:
    """Packs the documents of one split and writes its rows; the files appear with the first document."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, settings: dict):
        self._folder, self._settings = folder, settings
        sizes = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "vocab_size": tokenizer.vocab_size}
        self._packer = Packer(settings["row_length"], **sizes)
        self._columns = mds_columns(settings["row_length"], tokenizer.vocab_size)
        self._writer = None
        self.counts = np.zeros(tokenizer.vocab_size, np.int64)
        self.documents = self.rows = self.tokens = self.padding = self.text_bytes = 0

    def add(self, tokens: list[int], text_bytes: int) -> None:
        if self._writer is None:
            from streaming import MDSWriter  # seconds to import

            s = self._settings
            self._writer = MDSWriter(
                columns=self._columns,
                out=str(self._folder),
                compression=s["compression"],
                hashes=["sha256"],
                size_limit=s["shard_size"],
            )
        self.documents += 1
        self.text_bytes += text_bytes
        self._store(self._packer.add(tokens))

    def _store(self, rows) -> None:
        for row in rows:
            self._writer.write(to_sample(row))
            real = row.tokens[: len(row.tokens) - row.padding]
            self.counts += np.bincount(real, minlength=len(self.counts))
            self.rows += 1
            self.tokens += len(real)
            self.padding += row.padding

    def finish(self) -> dict:
        """Writes what is left and the index; returns the split's part of dataset.json."""
        self._store(self._packer.finish())
        self.counts[self._packer.bos_id] = 0  # no model ever has to predict it
        self._writer.finish()
        files = {}
        for path in sorted(self._folder.iterdir()):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        fields = ("rows", "tokens", "padding", "documents", "text_bytes")
        return {**{field: getattr(self, field) for field in fields}, "files": files}

    def close(self) -> None:
        """Ends MDSWriter's threads, after an error too."""
        if self._writer is not None:
            self._writer.cancel_future_jobs()


class _DocumentDigest:
    """sha256 over documents in order, each with its length, so that moving a border between two is noticed."""

    def __init__(self):
        self._sha256, self.count = hashlib.sha256(), 0
        self.hexdigest = self._sha256.hexdigest

    def add(self, text: str) -> bytes:
        data = text.encode()
        self._sha256.update(len(data).to_bytes(8, "little") + data)
        self.count += 1
        return data


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cross_entropy(of: np.ndarray, under: np.ndarray) -> float:
    """-sum p log q in nats, p and q proportional to the two counts [vocab_size]."""
    seen = of > 0
    return float((of[seen] / of.sum() * (math.log(under.sum()) - np.log(under[seen]))).sum())


@contextmanager
def _private_folder(out: Path) -> Iterator[Path]:
    """An empty folder beside `out` that only this process writes; gone afterwards, whatever happens.

    Its name is fixed, so what a killed process left is found and removed; the lock inside tells a dead owner from a
    living one, because the kernel drops it with the process.
    """
    folder = out.parent / f".{out.name}.preparing"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(folder / "lock").st_ino == os.fstat(lock.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            current = False
        if not current:
            raise DatasetError(f"{out}: another process is preparing it", remedy="wait for it, or name another folder")
        content = folder / "dataset"
        try:
            shutil.rmtree(content, ignore_errors=True)
            content.mkdir()
            yield content
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _commit(folder: Path, out: Path) -> None:
    """Makes `folder` durable, then gives it its final name in one step."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if out.exists():
        raise DatasetError(f"{out}: appeared while it was being prepared", remedy="name another folder")
    os.rename(folder, out)
