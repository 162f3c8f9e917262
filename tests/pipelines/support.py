"""What several tests here share: the settings of the test dataset, a stream with short arguments, damage to files."""

from pathlib import Path

import torch

import ssa_pipelines

ROW_LENGTH = 77  # odd, and shorter than most documents
SETTINGS = {
    "row_length": ROW_LENGTH,
    "validation_fraction": 0.1,
    "shard_size": 40_000,
    "part_bytes": 1 << 16,
    "seed": 5,
}


def stream(path, *, rank=0, size=1, micro=2, batch=12, seed=3, **options) -> ssa_pipelines.TrainStream:
    return ssa_pipelines.TrainStream(
        path,
        micro_batch_rows=micro,
        global_batch_rows=batch,
        data_parallel_rank=rank,
        data_parallel_size=size,
        seed=seed,
        **options,
    )


def take(rows, count: int) -> list[ssa_pipelines.Rows]:
    return [next(rows) for _ in range(count)]


def equal(a: list[ssa_pipelines.Rows], b: list[ssa_pipelines.Rows]) -> bool:
    """Same number of micro-batches, same tokens and document starts at every position."""
    return len(a) == len(b) and all(
        torch.equal(x.tokens, y.tokens) and torch.equal(x.doc_starts, y.doc_starts) for x, y in zip(a, b, strict=True)
    )


def flip_bit(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
