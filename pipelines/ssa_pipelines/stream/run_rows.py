"""All rows of a run: its sources opened, mixed and ordered. Row p of the run is a pure function of p.

It refuses sources prepared with different tokenizers or row lengths, and a cache that could not hold what the shuffle mixes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ssa_pipelines.errors import DatasetError, DatasetMismatch
from ssa_pipelines.shards.dataset import DatasetInfo, load_dataset_info
from ssa_pipelines.shards.row_reader import RowReader
from ssa_pipelines.storage.shard_cache import Access
from ssa_pipelines.storage.stall_timer import StallTimer
from ssa_pipelines.stream.mixture import Mixture, Origin, Phase
from ssa_pipelines.stream.row_order import SHUFFLE_BLOCK, RunOrder, window_rows

Location = str | Path


class RowOrigin(NamedTuple):
    """What a row of the run is made of: its source, the epoch of that source, and the row number in its split."""

    source: str
    epoch: int
    row: int


def open_sources(sources: Location | Mapping[str, Location], access: Access | None = None) -> dict[str, DatasetInfo]:
    """The datasets of a run by source name, in name order; a single unnamed one is called "".

    Raises DatasetError for a location without a dataset, DatasetMismatch unless all have one tokenizer and row length.
    """
    named = sources if isinstance(sources, Mapping) else {"": sources}
    if not named:
        raise DatasetError("no dataset was given", remedy="name a folder written by prepare", id="no-dataset")
    infos = {name: load_dataset_info(named[name], access) for name in sorted(named)}
    first = next(iter(infos.values()))
    for info in infos.values():
        for field in ("tokenizer_fingerprint", "row_length"):
            if getattr(info, field) != getattr(first, field):
                raise DatasetMismatch(
                    f"{field} is {getattr(first, field)} in {first.location}, {getattr(info, field)} in {info.location}",
                    remedy="prepare all sources with one tokenizer and one row length",
                    id="sources-differ",
                )
    return infos


class RunRows:
    """The rows of a run over one or several sources.

    stall_timer: of the consumer of the rows; see RowReader.
    phases: weights of the sources by tokens of the run; by default each source in proportion to its rows.
    """

    def __init__(
        self,
        infos: dict[str, DatasetInfo],
        split: str,
        *,
        phases: Sequence[Phase] = (),
        seed: int,
        shuffle: bool,
        shuffle_block: int = SHUFFLE_BLOCK,
        access: Access | None = None,
        stall_timer: StallTimer | None = None,
    ):
        self.infos, self.names, self._seed = infos, list(infos), seed
        self.row_length = next(iter(infos.values())).row_length
        self.readers = [RowReader(info, split, access, stall_timer=stall_timer) for info in infos.values()]
        for reader in self.readers:
            _check_cache(reader, shuffle_block if shuffle else None, access)
        self.orders = [
            RunOrder(r.rows_per_shard, seed=seed, shuffle=shuffle, block=shuffle_block) for r in self.readers
        ]
        given = [Phase(p.from_tokens, dict(p.weights)) for p in phases]
        self.phases = given or [Phase(0, {n: float(r.rows) for n, r in zip(self.names, self.readers, strict=True)})]
        self.begin_at(Origin(0, (0,) * len(infos)))

    def begin_at(self, origin: Origin) -> None:
        """Counts the rows of the sources from `origin` on, where an earlier mixture left them."""
        self.mixture = Mixture(self.names, self.phases, row_length=self.row_length, seed=self._seed, origin=origin)

    def origins(self, position: int, count: int) -> list[RowOrigin]:
        """Source, epoch and row number of rows position .. position + count - 1 of the run."""
        return [
            RowOrigin(self.names[source], at // self.orders[source].rows, self.orders[source].at(at))
            for source, at in self._locate(position, count)
        ]

    def read(self, position: int, count: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, starts, documents) of rows position .. position + count - 1 of the run; see RowReader.read."""
        return [self.readers[s].read(self.orders[s].at(at)) for s, at in self._locate(position, count)]

    def shards(self, position: int, count: int) -> list[tuple[int, int]]:
        """(source number, shard number) of the rows position .. position + count - 1 of the run, each once."""
        found = [(s, self.readers[s].shard_of(self.orders[s].at(at))) for s, at in self._locate(position, count)]
        return list(dict.fromkeys(found))

    def epochs(self, position: int) -> dict[str, float]:
        """Epochs of each source before this row of the run."""
        seen = self.mixture.seen(position)
        return {name: int(n) / order.rows for name, n, order in zip(self.names, seen, self.orders, strict=True)}

    def _locate(self, position: int, count: int) -> list[tuple[int, int]]:
        sources, rows = self.mixture.at(position, count)
        return list(zip(sources.tolist(), rows.tolist(), strict=True))


def _check_cache(reader: RowReader, shuffle_block: int | None, access: Access | None) -> None:
    limit = access.cache_limit if access else None
    if limit is None or not reader.info.remote:
        return
    sizes = reader.shard_bytes()
    mixed = window_rows(reader.rows_per_shard, shuffle_block) if shuffle_block else 1
    need = int(min(1.0, mixed / reader.rows) * sizes.sum() + 2 * sizes.max())
    if limit < need:
        raise DatasetError(
            f"{reader.info.location}: a cache of {limit:,} bytes cannot hold the {need:,} bytes that the shuffle mixes: every "
            "shard would be downloaded many times",
            remedy="raise data.cache_limit, or lower data.shuffle_block",
            id="cache-limit-below-shuffle",
        )
