"""Writes a checkpoint: every rank its own fragments, in threads; rank 0 the manifest; one rename to commit.

Until the rename the work lies in a temporary folder that no loader looks at; a failure on any rank (a full disk) removes it,
leaves older checkpoints as they are, and is reported instead of raised, so that training can go on. There is no snapshot: what
a checkpoint holds changes in the optimizer's step only, so threads read it from live storage during the next forward and
backward, and `PendingCheckpoint.finish` comes before the next step.
"""

import contextlib
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from torch import Tensor

from ssa_megatron.checkpoint.manifest import LATEST, MANIFEST, Manifest, StoredFile, committed, step_folder
from ssa_megatron.checkpoint.tensor_file import HostCopies, write_safetensors
from ssa_megatron.config import Recipe, digest
from ssa_megatron.files import replace_durably, sync_folder, write_durably
from ssa_megatron.parallel import device
from ssa_megatron.parallel.state import ParallelState
from ssa_megatron.zero.optimizer import ShardedOptimizer

THREADS = 4  # a rank; hashing runs at about half a gigabyte a second and core
SMALLEST_FILE, LARGEST_FILE = 2**26, 2**30  # bytes


class PendingCheckpoint:
    """A checkpoint whose files are being written by threads of every rank, from live storage.

    Until `finish` returns, masters, optimizer state and working weights must not change: forward, backward and evaluation may
    run, the optimizer's step may not.
    """

    def __init__(
        self,
        run: Path,
        optimizer: ShardedOptimizer,
        recipe: Recipe,
        parallel: ParallelState,
        *,
        step: int,
        state: dict,
        tokenizer_fingerprint: str,
    ):
        """Begin `run/checkpoints/step-XXXXXXXX`; every rank calls. `state` is the run's own at this step."""
        self.step = step
        self._recipe, self._parallel = recipe, parallel
        self._about = {"step": step, "state": state, "tokenizer_fingerprint": tokenizer_fingerprint}
        self._final = step_folder(run, step)
        self._temporary = self._final.with_name(f".tmp-{self._final.name}")
        self._files: list[tuple[str, dict[str, dict], Future]] = []
        threads = ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint")
        error = None
        if parallel.is_rank0:
            try:
                shutil.rmtree(self._temporary, ignore_errors=True)
                self._temporary.mkdir(parents=True)
            except OSError as problem:
                error = f"rank 0: {problem}"
        self._error = parallel.broadcast_object(error)
        if self._error is None:
            ready = device.event()
            for number, (tensors, pieces) in enumerate(_files(_pieces(optimizer, parallel))):
                name = f"rank-{parallel.rank:05d}-{number:03d}.safetensors"
                writing = threads.submit(write_safetensors, self._temporary / name, tensors, HostCopies(ready))
                self._files.append((name, pieces, writing))
        threads.shutdown(wait=False)  # they end when their files are written

    def finish(self) -> str | None:
        """Wait for this rank's files, then commit. Every rank calls and gets None, or a sentence that says what failed."""
        parallel = self._parallel
        if self._error:
            return f"not written: {self._error}"
        error, share = None, []
        wait([writing for _, _, writing in self._files])
        try:
            share = [(name, writing.result(), pieces) for name, pieces, writing in self._files]
        except Exception as problem:  # told below, on all ranks: none of them may wait for the others
            error = f"rank {parallel.rank}: {problem}"
        error = next((e for e in parallel.all_gather_object(error) if e), None)
        shares = parallel.gather_object(share) if error is None else []
        if parallel.is_rank0 and error is None:
            try:
                about: dict[str, Any] = {
                    **self._about,
                    "recipe": self._recipe.model_dump(mode="json"),
                    "recipe_digest": digest(self._recipe),
                }
                manifest = Manifest(**about, **_merge([file for share in shares for file in share]))
                commit(self._temporary, self._final, manifest)
            except OSError as problem:
                error = f"rank 0: {problem}"
        if error := parallel.broadcast_object(error):
            if parallel.is_rank0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            return f"not written: {error}"
        if parallel.is_rank0:
            try:
                point_latest_at(self._final)
            except OSError as problem:  # a signpost for people: loaders look at the folders themselves
                error = f"committed, but `{LATEST}` could not be pointed at it: {problem}"
        return parallel.broadcast_object(error)

    def abandon(self) -> None:
        """Wait for this rank's threads and commit nothing: the run is ending on an error. What is left, `prune` removes."""
        for _, _, writing in self._files:
            writing.cancel()
        wait([writing for _, _, writing in self._files])


def save_checkpoint(*args, **kwargs) -> str | None:
    """Begin and finish a PendingCheckpoint: None, or a sentence that says what failed."""
    return PendingCheckpoint(*args, **kwargs).finish()


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


def _pieces(optimizer: ShardedOptimizer, parallel: ParallelState) -> list[tuple[Tensor, dict]]:
    """(1-d tensor, description) of everything this rank stores: its fragments cut along the slabs of global tensors."""
    found = []
    for fragment in optimizer.fragments():
        if (fragment.named.replicated and parallel.tp_rank > 0) or fragment.named.tied_copy:
            continue  # other ranks hold the same values: one writes
        kinds = fragment.stored
        if fragment.working.dtype != fragment.master.dtype:
            kinds["weight"] = fragment.working
        for slab in fragment.named.slabs:
            first = max(fragment.start, slab.start)
            last = min(fragment.start + fragment.numel, slab.start + slab.numel)
            if first >= last:
                continue
            for kind, tensor in kinds.items():
                about = {
                    "name": slab.name,
                    "kind": kind,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "global_shape": slab.global_shape,
                    "offset": slab.offset,
                    "shape": slab.shape,
                    "range": (first - slab.start, last - slab.start),
                }
                view = tensor.narrow(0, first - fragment.start, last - first)
                found.append((view, about))
    return found


def _files(pieces: list[tuple[Tensor, dict]]) -> Iterator[tuple[dict[str, Tensor], dict[str, dict]]]:
    """(key -> tensor, key -> description) of each file: of bounded size, so that there is one for every thread and none waits
    long for another; larger pieces are cut."""
    bound = min(max(sum(tensor.nbytes for tensor, _ in pieces) // THREADS, SMALLEST_FILE), LARGEST_FILE)
    tensors: dict[str, Tensor] = {}
    descriptions: dict[str, dict] = {}
    size, number = 0, 0
    for tensor, about in pieces:
        first = about["range"][0]
        for part in tensor.split(bound // tensor.element_size()):
            if tensors and size + part.nbytes > bound:
                yield tensors, descriptions
                tensors, descriptions, size = {}, {}, 0
            key = f"{about['kind']}/{about['name']}#{number}"
            tensors[key], descriptions[key] = part, {**about, "range": (first, first + part.numel())}
            first, size, number = first + part.numel(), size + part.nbytes, number + 1
    if tensors:
        yield tensors, descriptions


def _merge(share: list[tuple[str, StoredFile, dict[str, dict]]]) -> dict:
    tensors: dict[str, dict[str, dict]] = {}
    for file, _, pieces in share:
        for key, about in pieces.items():
            entry = tensors.setdefault(about["name"], {}).setdefault(
                about["kind"], {"dtype": about["dtype"], "shape": about["global_shape"], "pieces": []}
            )
            where = {k: about[k] for k in ("offset", "shape", "range")}
            entry["pieces"].append({"file": file, "key": key, **where})
    return {"files": {file: stored for file, stored, _ in share}, "tensors": tensors}


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make a folder of complete files a checkpoint: manifest, fsync, one rename. Raises OSError."""
    write_durably(temporary / MANIFEST, manifest.to_json())
    sync_folder(temporary)
    if final.exists():  # an earlier, rejected attempt at the same step
        shutil.rmtree(final)
    temporary.rename(final)
    sync_folder(final.parent)


def point_latest_at(final: Path) -> None:
    replace_durably(final.parent / LATEST, final.name + "\n")
