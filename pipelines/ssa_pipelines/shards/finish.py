"""Last step of a preparation: packs what the parts left over, and writes a source's index, tokenizer and record.

Leftovers are packed in the order of the parts, so only the last row of a split is padded. The record `dataset.json` is
written, or uploaded, last: without it a folder is not a dataset.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.shards import scan
from ssa_pipelines.shards.dataset import FILE_NAME, FORMAT, RECORDS_NAME, with_fingerprint
from ssa_pipelines.shards.packing import Packer, smallest_dtype
from ssa_pipelines.shards.parts import SPLITS, Finished, ShardWriter, Tally
from ssa_pipelines.shards.preparation_plan import Job, Scanned, inputs_of
from ssa_pipelines.storage import object_store as storage


def finish_source(job: Job, source: Scanned, parts: list[Finished], folder: Path, out: str) -> dict:
    """Packs the leftovers in the order of the parts, writes index, tokenizer and record; returns the record."""
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
        tally.frequencies[tokenizer.bos_id] -= tally.documents  # a model never predicts it
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
            "duplicates": int((source.labels == scan.DUPLICATE).sum()),
            "splits": written,
            "files": {name: _describe(folder / name) for name in (RECORDS_NAME, *tokenizer.files)},
            "inputs": inputs_of(job.settings, source),
        }
    )
    (folder / FILE_NAME).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
    if remote:
        for path in sorted(folder.rglob("*"), key=lambda p: p.name == FILE_NAME):  # the record last
            if path.is_file():
                storage.upload(path, storage.join(out, str(path.relative_to(folder))))
    return record


def _stored(shard: dict) -> dict:
    return shard["zip_data"] or shard["raw_data"]


def _describe(path: Path) -> dict:
    data = path.read_bytes()
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _cross_entropy(of: NDArray, under: NDArray) -> float:
    """-sum p log q in nats, p and q proportional to the two counts [vocab_size]."""
    seen = of > 0
    return float((of[seen] / of.sum() * (math.log(under.sum()) - np.log(under[seen]))).sum())


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
