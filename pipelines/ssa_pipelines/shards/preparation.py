"""Corpus + tokenizer -> dataset folders: packed rows in MDS shards, split into train and validation.

Scans everything, encodes parts on all cores, then packs what the parts left over. A dataset appears complete or not at all.
Equal inputs give equal bytes, with any number of workers and after any number of kills; finished parts are kept. It refuses
to overwrite anything, a second writer, and splits that would be empty.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.corpus.documents import no_document
from ssa_pipelines.corpus.formats import FORMATS
from ssa_pipelines.corpus.formats.base import InputFile, ReadOptions
from ssa_pipelines.corpus.sources import Sources, named_sources
from ssa_pipelines.errors import CorpusError, DatasetError, DatasetMismatch
from ssa_pipelines.shards import scan
from ssa_pipelines.shards.dataset import FILE_NAME, load_dataset_info, to_json
from ssa_pipelines.shards.finish import finish_source
from ssa_pipelines.shards.packing import check_row_length, smallest_dtype
from ssa_pipelines.shards.parts import Finished, Layout, encode_part
from ssa_pipelines.shards.preparation_plan import Job, Progress, Scanned, below, inputs_of, plan_parts
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.tokenizer import Tokenizer
from ssa_pipelines.workers import map_unordered

_PRELOAD = ("ssa_pipelines.shards.parts", "streaming")  # seconds to import: done once for all workers
_STRIDE = 16 << 20


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
    """Encodes, packs and writes a corpus. Returns, per source, its `dataset.json` as a dict, plus "path" and "reused".

    sources: names of text (sources.py); a mapping of source names to names of text, where each source becomes a separate
        dataset, `out/SOURCE`; or any other iterable of documents (strings), which is first written to scratch.
    out: a folder, or `s3://bucket/prefix`.
    row_length: tokens per row; the dataset fits training at exactly this length.
    text_field, blank_line_documents: see ReadOptions.
    validation_fraction: share of the documents held out. Which ones depends only on `seed` and each document's text.
    deduplicate: keep only the first of exactly equal documents, over all sources.
    compression: None, or streaming's "zstd:LEVEL", "gz:LEVEL", ...
    shard_size: largest shard in bytes, uncompressed.
    part_bytes: text per part, the unit of parallel work and of what a kill can lose; by default 1/64 of the corpus, at
        most 64 MiB. It decides where shards end.
    workers: processes, by default one per core, fewer for little text; the result does not depend on it.
    reuse: return the datasets at `out` if they were made from exactly these inputs (the corpus is read to check).
    scratch: folder for unfinished work, by default next to `out`; for an `s3://` out, a fixed one in the temporary folder.
    progress: called with ("scanning", bytes read, total bytes), then ("encoding", bytes of text encoded, total bytes).
    Raises CorpusError, TokenizerError, DatasetError (something is at `out`, another process writes it, the disk is full,
    a worker was killed) or DatasetMismatch (reuse, but other inputs).
    """
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    layout = Layout(row_length, compression, shard_size)
    _check(layout, validation_fraction, tokenizer)
    options = ReadOptions(text_field, blank_line_documents)
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
        remedy = "name another folder, remove this one, or pass reuse=True"
        raise DatasetError(f"{taken}: already exists", remedy=remedy, id="dataset-exists")
    job = Job(str(out), tokenizer, layout, options, settings, part_bytes, workers, progress)
    folder = Path(scratch) if scratch else _scratch(str(out))
    # The dataset is assembled on the disk of `out`, where one rename publishes it; the scratch folder may be on another disk.
    staging = folder if storage.is_remote(out) else _scratch(str(out))
    try:
        with _owned(folder, str(out)), nullcontext() if staging == folder else _owned(staging, str(out)):
            if files is None:
                files = {"": [_spool(cast(Iterable[str], sources), folder)]}
                job = job._replace(options=ReadOptions())
            found = _scan(job, files, given)
            if taken:
                return {name: _existing(below(out, name), source, settings) for name, source in found.items()}
            return _write(job, found, folder, staging / "dataset")
    except OSError as error:  # of writing; reading the corpus raises CorpusError
        raise DatasetError(
            f"{out}: cannot be written ({error})",
            remedy="free disk space, then run the same command again: finished parts are kept",
            id="dataset-not-written",
        ) from error


def _check(layout: Layout, fraction: float, tokenizer: Tokenizer) -> None:
    row_length = layout.row_length
    check_row_length(row_length)
    if not 0 <= fraction < 1:
        problem, remedy = f"validation_fraction {fraction} is not in [0, 1)", "0.005 holds out 0.5 %"
        raise DatasetError(problem, remedy=remedy, id="validation-fraction")
    if layout.compression is not None:
        from streaming.base.compression import is_compression  # seconds to import

        if not is_compression(layout.compression):
            problem = f"compression {layout.compression!r} is not known"
            raise DatasetError(problem, remedy="use None or zstd:3", id="unknown-shard-compression")
    bytes_per_token = smallest_dtype(tokenizer.vocab_size).itemsize + smallest_dtype(row_length).itemsize + 4
    least = row_length * bytes_per_token + 4096
    if not least <= layout.shard_size < 1 << 32:
        raise DatasetError(
            f"shard_size {layout.shard_size}: a shard takes {least} to {(1 << 32) - 1} bytes at this row_length",
            remedy="leave it at 64 MiB",
            id="shard-size",
        )


def _scan(job: Job, files: dict[str, list[InputFile]], given: object) -> dict[str, Scanned]:
    """Reads all sources once, in parallel, and labels the documents of all of them together."""
    total, done = sum(file.size for source in files.values() for file in source), 0
    stride = min(_STRIDE, max(1 << 20, total // 64), job.part_bytes or _STRIDE)
    tasks = [scan.scan_tasks(source, job.options, stride) for source in files.values()]
    found: list[dict[int, scan.Scanned]] = [{} for _ in tasks]
    flat = ((which, task) for which, source in enumerate(tasks) for task in source)
    processes = job.processes(total // 8)  # scanning is eight times as fast as encoding
    for which, result in map_unordered(_scan_task, flat, processes, preload=_PRELOAD):
        found[which][result.number] = result
        done += result.stored_bytes
        if job.progress:
            job.progress("scanning", done, total)
    ordered = [[source[number] for number in sorted(source)] for source in found]
    hashes = [np.concatenate([r.hashes for r in results]) if results else np.empty(0) for results in ordered]
    for name, source_hashes in zip(files, hashes, strict=True):
        if not len(source_hashes):
            names = given[name] if isinstance(given, Mapping) else given
            raise no_document("documents" if names is None else names)
    settings = job.settings
    labels = scan.split_labels(
        np.concatenate(hashes),
        fraction=settings["validation_fraction"],
        seed=settings["seed"],
        deduplicate=settings["deduplicate"],
    )
    begin = 0
    sources: dict[str, Scanned] = {}
    for name, results, source_hashes in zip(files, ordered, hashes, strict=True):
        own = labels[begin : begin + len(source_hashes)]
        begin += len(source_hashes)
        _check_splits(name, own, settings["validation_fraction"])
        sources[name] = Scanned(files[name], [c for r in results for c in r.counted], source_hashes, own)
    return sources


def _scan_task(which_task: tuple[int, scan.ScanTask]) -> tuple[int, scan.Scanned]:
    return which_task[0], scan.scan(which_task[1])


def _check_splits(name: str, labels: NDArray, fraction: float) -> None:
    counts = np.bincount(labels, minlength=3)
    if not counts[scan.TRAIN] or (fraction and not counts[scan.VALIDATION]):
        empty = "validation" if counts[scan.TRAIN] else "train"
        raise CorpusError(
            f"{name and name + ': '}validation_fraction {fraction} of {len(labels) - counts[scan.DUPLICATE]} documents "
            f"leaves the {empty} split empty",
            remedy="give more documents, another seed or fraction; validation_fraction=0 makes no validation split",
            id="empty-split",
        )


def _write(job: Job, found: dict[str, Scanned], scratch: Path, content: Path) -> dict[str, dict]:
    _drop_other_work(scratch, job, found)
    model = scratch / job.tokenizer.file_name
    for name, data in job.tokenizer.files.items():
        (scratch / name).write_bytes(data)
    parts = {name: list(plan_parts(job, name, source, scratch, str(model))) for name, source in found.items()}
    flat = [part for source in parts.values() for part in source]
    total, done = sum(part.text_bytes for part in flat), 0
    size_of = {part.folder: part.text_bytes for part in flat}
    processes = min(job.processes(total), len(flat))
    for folder in map_unordered(encode_part, flat, processes, preload=_PRELOAD):
        done += size_of[folder]
        if job.progress:
            job.progress("encoding", done, total)
    shutil.rmtree(content, ignore_errors=True)
    records = {}
    for name, source in found.items():
        finished = [Finished(Path(part.folder), job.tokenizer.vocab_size) for part in parts[name]]
        records[name] = finish_source(job, source, finished, content / name if name else content, below(job.out, name))
    if not storage.is_remote(job.out):
        _commit(content, Path(job.out))
    shutil.rmtree(scratch / "parts")
    return {name: {**record, "path": below(job.out, name), "reused": False} for name, record in records.items()}


def _existing(out: str, source: Scanned, settings: dict) -> dict:
    info = load_dataset_info(out)
    for field, value in inputs_of(settings, source).items():
        if info.inputs.get(field) != value:
            raise DatasetMismatch(
                f"{out}: {field} is {info.inputs.get(field)} in the dataset there, {value} was asked for",
                remedy="name another folder, or remove this one to prepare it again",
                id="dataset-of-other-inputs",
            )
    return {**to_json(info), "path": out, "reused": True}


def _taken(out: str | Path, names: Iterable[str]) -> str | None:
    """The path or URL of what already exists at `out`, if anything."""
    if not storage.is_remote(out):
        return str(out) if storage.exists(out) else None
    return next((below(out, n) for n in names if storage.exists(storage.join(below(out, n), FILE_NAME))), None)


def _scratch(out: str) -> Path:
    """Folder of unfinished work. Its name is fixed, so that the next attempt finds it."""
    if storage.is_remote(out):
        return Path(tempfile.gettempdir(), f"ssa-prepare-{hashlib.sha256(out.encode()).hexdigest()[:16]}")
    return Path(out).parent / f".{Path(out).name}.preparing"


@contextmanager
def _owned(folder: Path, out: str) -> Iterator[None]:
    """Reserves `folder` for this process. It is removed when the work is done or no part was begun, and kept otherwise.

    The kernel drops the lock inside with its process, so an owner that died does not block the next one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(folder / "lock").st_ino == os.fstat(lock.fileno()).st_ino
        except (BlockingIOError, FileNotFoundError):
            current = False
        if not current:
            problem, remedy = f"{out}: another process is preparing it", "wait for it, or name another folder"
            raise DatasetError(problem, remedy=remedy, id="dataset-being-prepared")
        try:
            yield
        except BaseException:
            if not (folder / "parts").exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _drop_other_work(scratch: Path, job: Job, found: dict[str, Scanned]) -> None:
    """Removes parts that an earlier attempt made from other inputs."""
    inputs = {name: inputs_of(job.settings, source) for name, source in found.items()}
    plan = json.dumps({**inputs, "out": job.out, "part_bytes": job.part_bytes}, sort_keys=True)
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
    return InputFile(str(path), "documents", path.stat().st_size, FORMATS[".jsonl"])


def _commit(folder: Path, out: Path) -> None:
    """Syncs `folder` to disk, then renames it to its final name."""
    for path in [*folder.rglob("*"), folder]:
        storage.fsync(path)
    if storage.exists(out):
        problem = f"{out}: appeared while it was being prepared"
        raise DatasetError(problem, remedy="name another folder", id="dataset-appeared")
    os.rename(folder, out)
    storage.fsync(out.parent)
