"""Corpus + tokenizer -> dataset folders: packed rows in MDS shards, split into train and validation, described once.

Scan everything, encode parts on all cores, then pack what the parts left over. A dataset appears complete or not at all;
equal inputs give equal bytes, whatever the number of workers and however often it was killed on the way: what is finished
is kept beside it and not done again. It refuses to write over anything, a second writer, and splits that would be empty.
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipelines import scan, storage
from pipelines.dataset import FILE_NAME, FORMAT, RECORDS_NAME, load_dataset_info, to_json, with_fingerprint
from pipelines.documents import Format, no_document
from pipelines.errors import CorpusError, DatasetError, DatasetMismatch
from pipelines.packing import NO_DOCUMENT, Packer, smallest_dtype
from pipelines.parts import SPLITS, Finished, Layout, Part, ShardWriter, Tally, encode_part
from pipelines.sources import InputFile, Sources, named_sources
from pipelines.tokenizer import Tokenizer
from pipelines.workers import map_unordered

Progress = Callable[[str, int, int | None], None]
_PRELOAD = ("pipelines.parts", "streaming")  # seconds to import: once, not in every worker
PART_BYTES = 64 << 20  # of text; enough for a full shard
_STRIDE = 16 << 20
_PIECES = 16  # a compressed file is decompressed from its beginning for each of its parts, so it has this many at most
_BYTES_A_WORKER = 16 << 20  # of text; below, starting a process costs more than it brings


class _Scanned(NamedTuple):
    """A source after the first pass."""

    files: list[InputFile]
    counted: list[scan.Counted]
    hashes: NDArray
    fates: NDArray[np.uint8]

    @property
    def documents(self) -> int:
        return len(self.hashes)


def prepare(
    sources: Sources | Mapping[str, Sources] | Iterable[str],
    tokenizer: Tokenizer | str | Path,
    out: str | Path,
    *,
    row_length: int,
    validation_fraction: float = 0.005,
    seed: int = 0,
    text_field: str = "text",
    blank_line_documents: bool = False,
    deduplicate: bool = True,
    compression: str | None = None,
    shard_size: int = 64 << 20,
    part_bytes: int | None = None,
    workers: int | None = None,
    reuse: bool = False,
    scratch: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, dict]:
    """Encodes, packs and writes a corpus. Returns, for each source, its `dataset.json` as a dict, plus "path" and "reused".

    sources: names of text (sources.py); a mapping of source names to names of text, each of which becomes a dataset of
        its own, `out/SOURCE`; or any other iterable of documents (strings), which is first written to scratch.
    out: a folder, or `s3://bucket/prefix`.
    row_length: tokens in a row; the dataset fits training at exactly this length.
    validation_fraction: share of the documents held out. Which ones depends on `seed` and each document's text alone.
    deduplicate: of exactly equal documents, in all sources together, keep the first.
    compression: None, or streaming's "zstd:LEVEL", "gz:LEVEL", ...
    shard_size: most bytes in a shard, uncompressed.
    part_bytes: text in a part, the unit of parallel work and of what a kill can lose; by default 1/64 of the corpus, at
        most 64 MiB. It decides where shards end.
    workers: processes, by default one a core, fewer for little text; the result does not depend on it.
    reuse: return the datasets at `out` if they were made from these very inputs (the corpus is read to be sure).
    scratch: folder for unfinished work, by default beside `out`; for an `s3://` out, a fixed one in the temporary folder.
    progress: called with ("scanning", bytes read, bytes in all), then ("encoding", bytes of text encoded, bytes in all).
    Raises CorpusError, TokenizerError, DatasetError (something is at `out`, another process writes it, the disk is full,
    a worker was killed) or DatasetMismatch (reuse, but other inputs).
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    layout = Layout(row_length, compression, shard_size)
    _check(layout, validation_fraction, tokenizer)
    form = Format(text_field, blank_line_documents)
    settings = {
        **layout._asdict(),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "validation_fraction": validation_fraction,
        "seed": seed,
        "deduplicate": deduplicate,
    }
    given = sources if isinstance(sources, str | Path | list | tuple | Mapping) else None
    files = named_sources(given) if given is not None else None
    taken = _taken(out, files or {"": []})
    if taken and not reuse:
        raise DatasetError(
            f"{taken}: already exists", remedy="name another folder, remove this one, or pass reuse=True"
        )
    job = _Job(str(out), tokenizer, layout, form, settings, part_bytes, workers, progress)
    folder = Path(scratch) if scratch else _scratch(str(out))
    try:
        with _owned(folder, str(out)):
            if files is None:
                files, form = {"": [_spool(sources, folder)]}, Format()
                job = job._replace(form=form)
            found = _scan(job, files, given)
            if taken:
                return {name: _existing(_below(out, name), source, settings) for name, source in found.items()}
            return _write(job, found, folder)
    except OSError as error:  # what concerns the corpus is a CorpusError by now
        raise DatasetError(
            f"{out}: cannot be written ({error})",
            remedy="free disk space, then give the same command again: what is finished is kept",
        ) from error


class _Job(NamedTuple):
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


def _check(layout: Layout, fraction: float, tokenizer: Tokenizer) -> None:
    row_length = layout.row_length
    if row_length < 2:
        raise DatasetError(
            f"row_length {row_length}: a row of one token has nothing to predict", remedy="use 2 or more"
        )
    if not 0 <= fraction < 1:
        raise DatasetError(f"validation_fraction {fraction} is not in [0, 1)", remedy="0.005 holds out 0.5 %")
    if layout.compression is not None:
        from streaming.base.compression import is_compression  # seconds to import

        if not is_compression(layout.compression):
            raise DatasetError(f"compression {layout.compression!r} is not known", remedy="use None or zstd:3")
    least = (
        row_length * (smallest_dtype(tokenizer.vocab_size).itemsize + smallest_dtype(row_length).itemsize + 4) + 4096
    )
    if not least <= layout.shard_size < 1 << 32:
        raise DatasetError(
            f"shard_size {layout.shard_size}: a shard takes {least} to {(1 << 32) - 1} bytes at this row_length",
            remedy="leave it at 64 MiB",
        )


# ------------------------------------------------------------------------------------------------------- first pass
def _scan(job: _Job, files: dict[str, list[InputFile]], given: object) -> dict[str, _Scanned]:
    """Reads all sources once, in parallel, and decides the fate of every document of all of them together."""
    total, done = sum(file.size for source in files.values() for file in source), 0
    stride = min(_STRIDE, max(1 << 20, total // 64), job.part_bytes or _STRIDE)
    tasks = [scan.scan_tasks(source, job.form, stride) for source in files.values()]
    found: list[dict[int, scan.Scanned]] = [{} for _ in tasks]
    flat = ((which, task) for which, source in enumerate(tasks) for task in source)
    processes = job.processes(total // 8)  # scanning is that much faster than encoding
    for which, result in map_unordered(_scan_task, flat, processes, preload=_PRELOAD):
        found[which][result.number] = result
        done += result.stored_bytes
        if job.progress:
            job.progress("scanning", done, total)
    ordered = [[source[number] for number in sorted(source)] for source in found]
    hashes = [np.concatenate([r.hashes for r in source]) if source else None for source in ordered]
    for name, source_hashes in zip(files, hashes, strict=True):
        if source_hashes is None or not len(source_hashes):
            raise no_document(
                given[name] if isinstance(given, Mapping) else given if given is not None else "documents"
            )
    options = {k: job.settings[s] for k, s in (("fraction", "validation_fraction"), ("seed", "seed"))}
    fates = scan.fates(np.concatenate(hashes), **options, deduplicate=job.settings["deduplicate"])
    result, begin = {}, 0
    for name, source, source_hashes in zip(files, ordered, hashes, strict=True):
        own = fates[begin : begin + len(source_hashes)]
        begin += len(source_hashes)
        _check_splits(name, own, job.settings["validation_fraction"])
        result[name] = _Scanned(files[name], [c for r in source for c in r.counted], source_hashes, own)
    return result


def _scan_task(which_task: tuple[int, scan.ScanTask]) -> tuple[int, scan.Scanned]:
    return which_task[0], scan.scan(which_task[1])


def _check_splits(name: str, fates: NDArray, fraction: float) -> None:
    counts = np.bincount(fates, minlength=3)
    if not counts[scan.TRAIN] or (fraction and not counts[scan.VALIDATION]):
        empty = "validation" if counts[scan.TRAIN] else "train"
        raise CorpusError(
            f"{name and name + ': '}validation_fraction {fraction} of {len(fates) - counts[scan.DUPLICATE]} documents "
            f"leaves the {empty} split empty",
            remedy="give more documents, another seed or fraction; validation_fraction=0 makes no validation split",
        )


# ------------------------------------------------------------------------------------------------------ second pass
def _write(job: _Job, found: dict[str, _Scanned], scratch: Path) -> dict[str, dict]:
    _keep_only_work_on(scratch, job, found)
    model = scratch / job.tokenizer.file_name
    for name, data in job.tokenizer.files.items():
        (scratch / name).write_bytes(data)
    parts = {name: list(_parts(job, name, source, scratch, str(model))) for name, source in found.items()}
    flat = [part for source in parts.values() for part in source]
    total, done = sum(part.text_bytes for part in flat), 0
    size_of = {part.folder: part.text_bytes for part in flat}
    processes = min(job.processes(total), len(flat))
    for folder in map_unordered(encode_part, flat, processes, preload=_PRELOAD):
        done += size_of[folder]
        if job.progress:
            job.progress("encoding", done, total)
    content = scratch / "dataset"
    shutil.rmtree(content, ignore_errors=True)
    records = {}
    for name, source in found.items():
        records[name] = _finish(job, source, [Finished(Path(p.folder), job.tokenizer.vocab_size) for p in parts[name]],
                                content / name if name else content, _below(job.out, name))  # fmt: skip
    if not storage.is_remote(job.out):
        _commit(content, Path(job.out))
    shutil.rmtree(scratch / "parts")
    return {name: {**record, "path": _below(job.out, name), "reused": False} for name, record in records.items()}


def _parts(job: _Job, name: str, source: _Scanned, scratch: Path, model: str) -> Iterator[Part]:
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
            upload=storage.join(_below(job.out, name), "train") if storage.is_remote(job.out) else None,
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


# ------------------------------------------------------------------------------------------- what the parts left over
def _finish(job: _Job, source: _Scanned, parts: list[Finished], folder: Path, out: str) -> dict:
    """Packs the leftovers in the parts' order, writes index, tokenizer and record; returns the record."""
    tokenizer, remote = job.tokenizer, storage.is_remote(out)
    tallies = {split: Tally(tokenizer.vocab_size) for split in SPLITS}
    written = {}
    for split in SPLITS:
        for part in parts:
            tallies[split].merge(part.tallies[split])
        tally = tallies[split]
        if not tally.documents:
            continue
        (folder / split).mkdir(parents=True)
        packer = Packer(job.layout.row_length, eos_id=tokenizer.eos_id, vocab_size=tokenizer.vocab_size)
        writer = ShardWriter(folder / split, len(parts), job.layout, tokenizer.vocab_size)
        try:
            for part in parts:
                for tokens, document in part.leftovers(split):
                    writer.write(packer.add(tokens, document))
            writer.write(packer.finish())
            own = writer.finish()
        finally:
            writer.close()
        done = [(part, shard) for part in parts for shard in part.shards] if split == "train" else []
        if not remote:
            for part, shard in done:
                name = _stored(shard)["basename"]
                _link(part.folder / name, folder / split / name)
        shards = [shard for _, shard in done] + own
        index = folder / split / "index.json"
        index.write_text(json.dumps({"version": 2, "shards": shards}, sort_keys=True))
        files = {_stored(s)["basename"]: {"bytes": _stored(s)["bytes"], "sha256": _stored(s)["hashes"]["sha256"]}
                 for s in shards}  # fmt: skip
        files["index.json"] = _describe(index)
        written[split] = {
            "rows": writer.rows + (sum(part.rows for part in parts) if split == "train" else 0),
            "tokens": tally.tokens,
            "padding": writer.padding,
            "documents": tally.documents,
            "text_bytes": tally.text_bytes,
            "lengths": np.trim_zeros(tally.lengths, "b").tolist(),
            "files": files,
        }
    for tally in tallies.values():
        tally.frequencies[tokenizer.bos_id] -= tally.documents  # the mark in front: no model ever has to predict it
    train, validation = (tallies[split].frequencies for split in SPLITS)
    per_file = np.zeros(len(source.files), np.int64)
    for counted in source.counted:
        per_file[counted.stretch.file] += counted.records
    table = [[file.name, int(count)] for file, count in zip(source.files, per_file, strict=True)]
    (folder / RECORDS_NAME).write_text(json.dumps(table))
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)
    record = with_fingerprint(
        {
            "format": FORMAT,
            "row_length": job.layout.row_length,
            "vocab_size": tokenizer.vocab_size,
            "token_dtype": str(smallest_dtype(tokenizer.vocab_size)),
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "tokenizer_file": tokenizer.file_name,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "unigram_entropy": _cross_entropy(train, train),
            "validation_unigram_cross_entropy": _cross_entropy(validation, train + 1) if validation.any() else None,
            "duplicates": int((source.fates == scan.DUPLICATE).sum()),
            "splits": written,
            "files": {name: _describe(folder / name) for name in (RECORDS_NAME, *tokenizer.files)},
            "inputs": _inputs(job.settings, source),
        }
    )
    (folder / FILE_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    if remote:
        for path in sorted(folder.rglob("*"), key=lambda p: p.name == FILE_NAME):  # last: it makes the dataset one
            if path.is_file():
                storage.upload(path, storage.join(out, str(path.relative_to(folder))))
    return record


def _inputs(settings: dict, source: _Scanned) -> dict:
    return {**settings, "documents": source.documents, "documents_sha256": scan.digest([source.hashes])}


def _existing(out: str, source: _Scanned, settings: dict) -> dict:
    info = load_dataset_info(out)
    for field, value in _inputs(settings, source).items():
        if info.inputs.get(field) != value:
            raise DatasetMismatch(
                f"{out}: {field} is {info.inputs.get(field)} in the dataset there, {value} was asked for",
                remedy="name another folder, or remove this one to have it prepared anew",
            )
    return {**to_json(info), "path": out, "reused": True}


def _stored(shard: dict) -> dict:
    return shard["zip_data"] or shard["raw_data"]


def _describe(path: Path) -> dict:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _cross_entropy(of: NDArray, under: NDArray) -> float:
    """-sum p log q in nats, p and q proportional to the two counts [vocab_size]."""
    seen = of > 0
    return float((of[seen] / of.sum() * (math.log(under.sum()) - np.log(under[seen]))).sum())


# ------------------------------------------------------------------------------------------------ folders and locks
def _below(out: str | Path, name: str) -> str:
    return storage.join(out, name) if name else str(out)


def _taken(out: str | Path, names: Iterable[str]) -> str | None:
    """What is at `out` already, if anything."""
    if not storage.is_remote(out):
        return str(out) if storage.exists(out) else None
    return next((_below(out, n) for n in names if storage.exists(storage.join(_below(out, n), FILE_NAME))), None)


def _scratch(out: str) -> Path:
    """Where unfinished work lies; a fixed name, so that the next attempt finds it."""
    if storage.is_remote(out):
        return Path(tempfile.gettempdir(), f"ssa-prepare-{hashlib.sha256(out.encode()).hexdigest()[:16]}")
    return Path(out).parent / f".{Path(out).name}.preparing"


@contextmanager
def _owned(folder: Path, out: str) -> Iterator[None]:
    """Holds `folder` for this process. It goes when the work is done or its corpus is at fault, and stays otherwise.

    The lock inside tells a dead owner from a living one, because the kernel drops it with the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(folder / "lock").st_ino == os.fstat(lock.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            current = False
        if not current:
            raise DatasetError(f"{out}: another process is preparing it", remedy="wait for it, or name another folder")
        try:
            yield
        except BaseException:
            if not (folder / "parts").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _keep_only_work_on(scratch: Path, job: _Job, found: dict[str, _Scanned]) -> None:
    """Drops the parts of an earlier attempt at something else."""
    plan = json.dumps({name: _inputs(job.settings, source) for name, source in found.items()} | {"out": job.out,
                      "part_bytes": job.part_bytes}, sort_keys=True)  # fmt: skip
    path = scratch / "plan.json"
    if not path.exists() or path.read_text() != plan:
        shutil.rmtree(scratch / "parts", ignore_errors=True)
        path.write_text(plan)
    (scratch / "parts").mkdir(exist_ok=True)


def _spool(documents: Iterable[str], scratch: Path) -> InputFile:
    """Writes an iterable of documents to a file that several processes can read."""
    path = scratch / "documents.jsonl"
    with open(path, "w", encoding="ascii") as file:
        for document in documents:
            file.write(json.dumps({"text": document}) + "\n")
    return InputFile(str(path), "documents", path.stat().st_size, ".jsonl")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _commit(folder: Path, out: Path) -> None:
    """Makes `folder` durable, then gives it its final name in one step."""
    for path in [*folder.rglob("*"), folder]:
        storage.fsync(path)
    if storage.exists(out):
        raise DatasetError(f"{out}: appeared while it was being prepared", remedy="name another folder")
    os.rename(folder, out)
    storage.fsync(out.parent)
