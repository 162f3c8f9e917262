"""Corpus + tokenizer -> dataset folders: packed rows in MDS shards, split into train and validation, described once.

Scan everything, encode parts on all cores, then pack what the parts left over. A dataset appears complete or not at all;
equal inputs give equal bytes, whatever the number of workers and however often it was killed on the way: what is finished
is kept beside it and not done again. It refuses to write over anything, a second writer, and splits that would be empty.
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

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.corpus.documents import Format, no_document
from ssa_pipelines.corpus.sources import InputFile, Sources, named_sources
from ssa_pipelines.errors import CorpusError, DatasetError, DatasetMismatch
from ssa_pipelines.shards import scan
from ssa_pipelines.shards.dataset import FILE_NAME, load_dataset_info, to_json
from ssa_pipelines.shards.finish import finish_source
from ssa_pipelines.shards.packing import smallest_dtype
from ssa_pipelines.shards.parts import Finished, Layout, encode_part
from ssa_pipelines.shards.preparation_plan import Job, Progress, Scanned, below, inputs_of, plan_parts
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.tokenizer.sentencepiece_tokenizer import Tokenizer
from ssa_pipelines.workers import map_unordered

_PRELOAD = ("ssa_pipelines.shards.parts", "streaming")  # seconds to import: once, not in every worker
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
    job = Job(str(out), tokenizer, layout, form, settings, part_bytes, workers, progress)
    folder = Path(scratch) if scratch else _scratch(str(out))
    # The dataset is put together where one rename can make it appear, also when the scratch folder is on another disk.
    beside = folder if storage.is_remote(out) else _scratch(str(out))
    try:
        with _owned(folder, str(out)), nullcontext() if beside == folder else _owned(beside, str(out)):
            if files is None:
                files, form = {"": [_spool(sources, folder)]}, Format()
                job = job._replace(form=form)
            found = _scan(job, files, given)
            if taken:
                return {name: _existing(below(out, name), source, settings) for name, source in found.items()}
            return _write(job, found, folder, beside / "dataset")
    except OSError as error:  # what concerns the corpus is a CorpusError by now
        raise DatasetError(
            f"{out}: cannot be written ({error})",
            remedy="free disk space, then give the same command again: what is finished is kept",
        ) from error


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
def _scan(job: Job, files: dict[str, list[InputFile]], given: object) -> dict[str, Scanned]:
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
        result[name] = Scanned(files[name], [c for r in source for c in r.counted], source_hashes, own)
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
def _write(job: Job, found: dict[str, Scanned], scratch: Path, content: Path) -> dict[str, dict]:
    _keep_only_work_on(scratch, job, found)
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
        records[name] = finish_source(job, source, [Finished(Path(p.folder), job.tokenizer.vocab_size) for p in parts[name]],
                                content / name if name else content, below(job.out, name))  # fmt: skip
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
                remedy="name another folder, or remove this one to have it prepared anew",
            )
    return {**to_json(info), "path": out, "reused": True}


# ------------------------------------------------------------------------------------------------ folders and locks
def _taken(out: str | Path, names: Iterable[str]) -> str | None:
    """What is at `out` already, if anything."""
    if not storage.is_remote(out):
        return str(out) if storage.exists(out) else None
    return next((below(out, n) for n in names if storage.exists(storage.join(below(out, n), FILE_NAME))), None)


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


def _keep_only_work_on(scratch: Path, job: Job, found: dict[str, Scanned]) -> None:
    """Drops the parts of an earlier attempt at something else."""
    plan = json.dumps({name: inputs_of(job.settings, source) for name, source in found.items()} | {"out": job.out,
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


def _commit(folder: Path, out: Path) -> None:
    """Makes `folder` durable, then gives it its final name in one step."""
    for path in [*folder.rglob("*"), folder]:
        storage.fsync(path)
    if storage.exists(out):
        raise DatasetError(f"{out}: appeared while it was being prepared", remedy="name another folder")
    os.rename(folder, out)
    storage.fsync(out.parent)
