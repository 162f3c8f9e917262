"""Writes a checkpoint: every rank its own fragments, rank 0 the manifest, one rename to commit.

Until the rename the work lies in a temporary folder that no loader looks at; a failure on any rank (a full disk) removes it,
leaves older checkpoints as they are, and is reported instead of raised, so that training can go on. Nothing is copied: tensors
go from their storage to the file piece by piece, and are hashed on the way, before the disk can lie about them.
"""

import contextlib
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import torch
from torch import Tensor

from ssa_megatron.checkpoint.manifest import LATEST, MANIFEST, Manifest, StoredFile, committed, step_folder
from ssa_megatron.config import Recipe, digest
from ssa_megatron.files import replace_durably, sync_folder, write_durably
from ssa_megatron.parallel.context import ParallelContext
from ssa_megatron.zero.optimizer import ShardedOptimizer

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def save_checkpoint(
    run: Path,
    optimizer: ShardedOptimizer,
    recipe: Recipe,
    context: ParallelContext,
    *,
    step: int,
    state: dict,
    tokenizer_fingerprint: str,
) -> str | None:
    """Commit `run/checkpoints/step-XXXXXXXX`. Every rank calls; every rank gets None, or a sentence that says what failed."""
    final = step_folder(run, step)
    temporary = final.with_name(f".tmp-{final.name}")
    error, share = None, {}
    if context.is_writer:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as problem:
            error = f"rank 0: {problem}"
    if error := context.agree(error):
        return f"not written: {error}"
    try:
        name = f"rank-{context.rank:05d}.safetensors"
        pieces = _pieces(optimizer, context)
        if pieces:
            stored = write_safetensors(temporary / name, {key: tensor for key, tensor, _ in pieces})
            share = {"file": name, "stored": stored, "pieces": [(key, about) for key, _, about in pieces]}
    except OSError as problem:
        error = f"rank {context.rank}: {problem}"
    shares = context.gather((error, share))
    error = next((e for e, _ in shares if e), None)
    if context.is_writer and error is None:
        try:
            manifest = Manifest(
                step=step,
                state=state,
                recipe=recipe.model_dump(),
                recipe_digest=digest(recipe),
                tokenizer_fingerprint=tokenizer_fingerprint,
                **_merge([share for _, share in shares if share]),
            )
            _commit(temporary, final, manifest)
        except OSError as problem:
            error = f"rank 0: {problem}"
    if error := context.agree(error):
        if context.is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
        return f"not written: {error}"
    if context.is_writer:
        try:
            _point_latest_at(final)
        except OSError as problem:  # a signpost for people: loaders look at the folders themselves
            error = f"committed, but `{LATEST}` could not be pointed at it: {problem}"
    return context.agree(error)


def prune(run: Path, keep: int, *, newest: int) -> None:
    """Remove all but the `keep` newest checkpoints up to step `newest`, and what a killed save left. Rank 0 only.

    Folders of later steps were passed over by the resume that led here: they count for nothing and are left to a person.

    What cannot be removed stays: an error here must not end training.
    """
    for path in [path for path in committed(run) if int(path.name.removeprefix("step-")) <= newest][keep:]:
        with contextlib.suppress(OSError):
            path.rename(path.with_name(f".tmp-old-{path.name}"))  # first: half a checkpoint must not look like one
    for path in (run / "checkpoints").glob(".tmp-*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> StoredFile:
    """A safetensors file of 1-d tensors, streamed, hashed while written, on disk (fsync) when this returns.

    The safetensors library writes whole dictionaries at once and hashes nothing; this holds one tensor at a time.
    """
    header, at = {}, 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    sha, total = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in (struct.pack("<Q", len(head)), head, *map(_bytes, tensors.values())):
            file.write(chunk)
            sha.update(chunk)
            total += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return StoredFile(bytes=total, sha256=sha.hexdigest())


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())


def _pieces(optimizer: ShardedOptimizer, context: ParallelContext) -> list[tuple[str, Tensor, dict]]:
    """(key, 1-d tensor, description) of everything this rank stores: its fragments cut along the blocks of global tensors."""
    found = []
    for fragment in optimizer.fragments():
        if (fragment.named.replicated and context.tensor_rank > 0) or fragment.named.tied_copy:
            continue  # other ranks hold the same values: one writes
        kinds = {"master": fragment.master, "exp_avg": fragment.exp_avg, "exp_avg_sq": fragment.exp_avg_sq}
        if fragment.working.dtype != fragment.master.dtype:
            kinds["weight"] = fragment.working
        for block in fragment.named.blocks:
            first = max(fragment.start, block.start)
            last = min(fragment.start + fragment.numel, block.start + block.numel)
            if first >= last:
                continue
            for kind, tensor in kinds.items():
                about = {
                    "name": block.name,
                    "kind": kind,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "global_shape": block.global_shape,
                    "offset": block.offset,
                    "shape": block.shape,
                    "range": (first - block.start, last - block.start),
                }
                view = tensor.narrow(0, first - fragment.start, last - first)
                found.append((f"{kind}/{block.name}#{len(found)}", view, about))
    return found


def _merge(shares: list[dict]) -> dict:
    files = {share["file"]: share["stored"] for share in shares}
    tensors: dict[str, dict[str, dict]] = {}
    for share in shares:
        for key, about in share["pieces"]:
            entry = tensors.setdefault(about["name"], {}).setdefault(
                about["kind"], {"dtype": about["dtype"], "shape": about["global_shape"], "pieces": []}
            )
            where = {k: about[k] for k in ("offset", "shape", "range")}
            entry["pieces"].append({"file": share["file"], "key": key, **where})
    return {"files": files, "tensors": tensors}


def _commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    write_durably(temporary / MANIFEST, manifest.to_json())
    sync_folder(temporary)
    if final.exists():  # an earlier, rejected attempt at the same step
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(final.parent)


def _point_latest_at(final: Path) -> None:
    replace_durably(final.parent / LATEST, final.name + "\n")
