"""Reads a checkpoint: verified files, tensors assembled by global name, at any topology.

`Checkpoint` opens one committed folder; `verify` compares every file with the manifest's size and sha256; `newest_valid`
finds, on all ranks together, the newest checkpoint that verifies and says why it passed over newer ones. No pickle is read.
"""

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssa_megatron.checkpoint.manifest import Manifest, committed, step_folder
from ssa_megatron.errors import CheckpointError
from ssa_megatron.parallel.state import ParallelState
from ssa_megatron.zero.optimizer import ShardedOptimizer
from ssa_pipelines import Tokenizer

THREADS = 4  # that hash files of one process


class Checkpoint:
    """One committed checkpoint, opened for reading. Tensors are read one at a time."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.content = Manifest.read(self.folder)
        self._open: dict[str, safe_open] = {}

    @classmethod
    def open(cls, path: str | Path, step: int | None = None) -> "Checkpoint":
        """`path`: a run folder (its newest checkpoint, or that of `step`) or a step folder. Files are verified first.

        Raises CheckpointError naming what is missing or damaged.
        """
        path = Path(path)
        if (path / "manifest.json").is_file():
            chosen = path
        elif step is not None:
            chosen = step_folder(path, step)
            if not chosen.is_dir():
                have = ", ".join(str(int(p.name[5:])) for p in committed(path)) or "none"
                raise CheckpointError(
                    f"{path} has no checkpoint of step {step}",
                    remedy=f"steps present: {have}",
                    id="no-checkpoint-of-step",
                )
        else:
            candidates = committed(path)
            if not candidates:
                raise CheckpointError(
                    f"{path} holds no committed checkpoint",
                    remedy="give a run folder that was trained",
                    id="no-committed-checkpoint",
                )
            chosen = candidates[0]
        checkpoint = cls(chosen)
        checkpoint.verify()
        return checkpoint

    @property
    def manifest(self) -> dict:
        """step, state, recipe_digest, tokenizer_fingerprint."""
        c = self.content
        return {
            "step": c.step,
            "state": c.state,
            "recipe_digest": c.recipe_digest,
            "tokenizer_fingerprint": c.tokenizer_fingerprint,
        }

    @property
    def recipe(self) -> dict:
        """The resolved recipe the checkpoint was trained with."""
        return self.content.recipe

    @property
    def tokenizer_path(self) -> Path:
        """The run's own copy of its tokenizer."""
        run = self.folder.parent.parent
        paths = [run / name for name in Tokenizer.file_names()]
        return next((path for path in paths if path.exists()), paths[0])

    def names(self) -> list[str]:
        return list(self.content.tensors)

    def verify(self, files: list[str] | None = None) -> None:
        """Compare `files` (all by default) with the manifest; raises CheckpointError naming the first that differs."""
        names = list(self.content.files) if files is None else files
        with ThreadPoolExecutor(THREADS) as threads:  # hashing releases the interpreter lock
            for _ in threads.map(self._verify_file, names):
                pass

    def _verify_file(self, name: str) -> None:
        expected, path = self.content.files[name], self.folder / name
        try:
            size = path.stat().st_size
            if size != expected.bytes:
                raise CheckpointError(
                    f"{path}: {size} bytes, the manifest says {expected.bytes}", id="checkpoint-file-size"
                )
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}", id="checkpoint-file-unreadable") from None
        if found != expected.sha256:
            raise CheckpointError(
                f"{path}: sha256 {found[:12]}..., the manifest says {expected.sha256[:12]}...",
                id="checkpoint-file-altered",
            )

    def tensor(self, name: str, kind: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """The whole global tensor, on the CPU. `weight` falls back to the master where they are the same values."""
        entry = self._entry(name, kind)
        return self.rectangle(name, kind, (0,) * len(entry["shape"]), tuple(entry["shape"])).to(
            dtype or getattr(torch, entry["dtype"])
        )

    def rectangle(self, name: str, kind: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The part of a global tensor that starts at `offset` and has `shape`, whatever pieces it is stored in.

        Of what is stored only the rows that meet it are read.
        """
        entry = self._entry(name, kind)
        result = torch.empty(shape, dtype=getattr(torch, entry["dtype"]))
        filled = 0
        for (p_offset, p_shape), pieces in _by_rectangle(entry["pieces"]).items():
            low = [max(a, b) for a, b in zip(offset, p_offset, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(offset, shape, p_offset, p_shape, strict=True)]
            if any(a >= b for a, b in zip(low, high, strict=True)):
                continue
            rows, width = high[0] - low[0], math.prod(p_shape[1:])
            # where whole rows of the result are stored they go straight to their place, without a second copy
            whole = (p_offset[1:], p_shape[1:]) == (tuple(offset[1:]), tuple(shape[1:]))
            place = result[low[0] - offset[0] : high[0] - offset[0]]
            stored = place.view(-1) if whole else torch.empty(rows * width, dtype=result.dtype)
            self._fill(stored, (low[0] - p_offset[0]) * width, pieces, f"{kind} {name}")
            if not whole:
                result[_slices(low, high, offset)] = stored.view(rows, *p_shape[1:])[
                    _slices(low, high, (low[0], *p_offset[1:]))
                ]
            filled += math.prod(b - a for a, b in zip(low, high, strict=True))
        if filled != result.numel():
            raise CheckpointError(
                f"{self.folder}: {kind} {name} covers {filled} of {result.numel()} requested elements",
                id="tensor-not-covered",
            )
        return result

    def _fill(self, stored: Tensor, first: int, pieces: list[dict], name: str) -> None:
        """Elements `first .. first + len(stored)` of a stored rectangle, whose pieces must follow one another."""
        at, last = first, first + len(stored)
        for piece in sorted(pieces, key=lambda piece: piece["range"]):
            begin, end = piece["range"]
            low, high = max(begin, first), min(end, last)
            if low >= high:
                continue
            if low != at:
                break  # a gap, or a piece twice: what is between would be whatever memory held
            stored[low - first : high - first] = self._read(piece, low - begin, high - begin)
            at = high
        if at != last:
            raise CheckpointError(
                f"{self.folder}: {name} is stored incompletely (elements {at}..{last} are missing)",
                id="tensor-incomplete",
            )

    def digest(self, kinds: tuple[str, ...] | None = None) -> str:
        """sha256 (hex) over whole tensors in canonical order: equal for equal contents, whatever topology wrote them.

        kinds: by default the masters, then the optimizer's state in alphabetical order.
        """
        sha = hashlib.sha256()
        for name in sorted(self.names()):
            for kind in kinds or ("master", *sorted(self.content.tensors[name].keys() - {"master", "weight"})):
                sha.update(self.tensor(name, kind).contiguous().view(torch.uint8).numpy().data)
        return sha.hexdigest()

    def _entry(self, name: str, kind: str) -> dict:
        kinds = self.content.tensors.get(name)
        if kinds is None:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name!r}",
                remedy="it was trained with another model",
                id="no-such-tensor",
            )
        if kind not in kinds and kind != "weight":
            raise CheckpointError(
                f"{self.folder} holds no {kind} of {name}",
                remedy="it was trained with another optimizer; use the one of its recipe",
                id="no-such-state",
            )
        return kinds.get(kind, kinds["master"])

    def _read(self, piece: dict, first: int, last: int) -> Tensor:
        file, key, (begin, end) = piece["file"], piece["key"], piece["range"]
        if file not in self.content.files:  # then nobody has verified it
            raise CheckpointError(
                f"{self.folder}: {key} lies in {file}, which the manifest does not list", id="tensor-file-not-listed"
            )
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            found = self._open[file].get_slice(key)
            if found.get_shape() != [end - begin]:
                raise CheckpointError(
                    f"{self.folder / file}: {key} has shape {found.get_shape()}, the manifest says {end - begin} elements",
                    id="tensor-shape-differs",
                )
            return found[first:last]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.folder / file}: {key} cannot be read ({error})", id="tensor-unreadable"
            ) from None


def newest_valid(run: Path, parallel: ParallelState) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that verifies, the same on every rank, and a line for each newer one passed over.

    The ranks share the hashing. Raises CheckpointError when checkpoints exist and none of them verifies: starting from
    scratch is a decision for a person.
    """
    rejected: list[str] = []
    for name in parallel.broadcast_object([path.name for path in committed(run)] if parallel.is_rank0 else None):
        problem, checkpoint = None, None
        try:
            checkpoint = Checkpoint(run / "checkpoints" / name)
            checkpoint.verify(list(checkpoint.content.files)[parallel.rank :: parallel.world_size])
        except CheckpointError as error:
            problem = error.problem
        problem = next((p for p in parallel.all_gather_object(problem) if p), None)
        if problem is None:
            return checkpoint, rejected
        rejected.append(f"checkpoint {name} is not used: {problem}")
    if rejected:
        raise CheckpointError(
            "no checkpoint of this run is intact:\n  " + "\n  ".join(rejected),
            remedy=f"restore {run / 'checkpoints'} from a copy, or move it away to start from scratch",
            id="no-intact-checkpoint",
        )
    return None, []


@torch.no_grad()
def load_into(checkpoint: Checkpoint, optimizer: ShardedOptimizer, *, applied_steps: int) -> None:
    """Fill this rank's masters and optimizer state, refresh the working weights, and check that they equal the file's.

    From an initial checkpoint only masters are read; the optimizer's state stays zero.
    """
    stored: list[list[tuple[str, slice, int]]] = []
    kinds = ("master",) if checkpoint.content.is_start else ("master", *optimizer.kind.state)
    for fragment in optimizer.fragments():
        stored.append([])
        for kind in kinds:
            for target, values in _fragment_values(checkpoint, fragment, kind):
                fragment.stored[kind][target] = values.to(fragment.master.device)
                stored[-1].append((kind, target, _bit_sum(values)))
                del values  # before the next one is assembled
    optimizer.restored(applied_steps)
    for fragment, parts in zip(optimizer.fragments(), stored, strict=True):
        if not torch.equal(fragment.working, fragment.master.to(fragment.working)):
            raise CheckpointError(
                f"{checkpoint.folder}: working weights differ from their masters after loading",
                id="weights-differ-from-masters",
            )
        for kind, target, expected in parts:
            if _bit_sum(fragment.stored[kind][target]) != expected:
                name = fragment.named.slabs[0].name
                raise CheckpointError(
                    f"{checkpoint.folder}: {kind} of {name} is not the file's after loading", id="loaded-tensor-differs"
                )


def _bit_sum(values: Tensor) -> int:
    """The sum of fp32 values' bit patterns: tells whether an optimizer kept what was written into it, without a second copy."""
    parts = values.view(torch.int32).split(2**20)  # torch widens what it sums to 64 bits first
    return sum(int(part.sum(dtype=torch.int64)) for part in parts)


def _fragment_values(checkpoint: Checkpoint, fragment, kind: str) -> Iterator[tuple[slice, Tensor]]:
    """(where in the fragment, values) of each slab that it meets; only the rows of the slab that hold them are read."""
    for slab in fragment.named.slabs:
        first = max(fragment.start, slab.start)
        last = min(fragment.start + fragment.numel, slab.start + slab.numel)
        if first < last:
            width = math.prod(slab.shape[1:])
            top, bottom = (first - slab.start) // width, -(-(last - slab.start) // width)
            rows = (slab.offset[0] + top, *slab.offset[1:]), (bottom - top, *slab.shape[1:])
            start = slab.start + top * width
            values = checkpoint.rectangle(slab.name, kind, *rows).view(-1)[first - start : last - start]
            yield slice(first - fragment.start, last - fragment.start), values


def _by_rectangle(pieces: list[dict]) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for piece in pieces:
        groups.setdefault((tuple(piece["offset"]), tuple(piece["shape"])), []).append(piece)
    return groups


def _slices(low: list[int], high: list[int], origin: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))
