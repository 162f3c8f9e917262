"""Which source each row of a run comes from: weights that change at given token counts, as a pure function.

Row p of the run is row `at(p)` of one source. It depends only on the seed, the phases and p, not on ranks or restarts. Every
prefix of the run holds each source in proportion to its weight, to within two rows. It refuses weights of unknown sources,
sources without a weight, and positive weights too small to be exact.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ssa_pipelines.errors import DatasetError
from ssa_pipelines.randomness import uniform

BLOCK = 1 << 16  # rows whose sources are drawn together; a weight under 1 / BLOCK would not be exact
_UNIT = 1 << 30  # weights are multiples of 1 / _UNIT: integers make every count exact


class Phase(NamedTuple):
    """From this many tokens of the run on, rows are drawn from the sources with these weights (of any sum)."""

    from_tokens: int
    weights: Mapping[str, float]


class Origin(NamedTuple):
    """Where a mixture begins: a row of the run, and the rows of each source that were seen before it."""

    row: int
    seen: tuple[int, ...]


class Mixture:
    """The sources of a run's rows.

    names: the sources; a source's number is its index here. phases: the first begins at 0 tokens, each later than the one
    before. origin: the row from which this mixture holds, after an earlier one. Raises DatasetError for impossible phases.
    """

    def __init__(
        self, names: Sequence[str], phases: Sequence[Phase], *, row_length: int, seed: int, origin: Origin | None = None
    ):
        _check(names, phases)
        self.names, self.phases, self._seed = tuple(names), tuple(phases), seed
        self.origin = origin or Origin(0, (0,) * len(names))
        begins = [-(-phase.from_tokens // row_length) for phase in phases]
        shares = [_shares([phase.weights.get(name, 0.0) for name in names]) for phase in phases]
        self._blocks: dict[tuple[int, int], tuple[NDArray, NDArray]] = {}
        self._parts: list[tuple[int, list[int], NDArray]] = []  # first row, shares, rows of each source seen before
        seen = np.array(self.origin.seen, np.int64)
        for begin, end, share in zip(begins, [*begins[1:], None], shares, strict=True):
            if end is not None and end <= max(begin, self.origin.row):
                continue
            begin = max(begin, self.origin.row)
            self._parts.append((begin, share, seen))
            seen = seen if end is None else seen + self._count(len(self._parts) - 1, end - begin)

    def at(self, row: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(sources, rows) of rows row .. row + count - 1 of the run, each [count]: the number of the source, and the number
        of its row, counted over all its epochs.
        """
        sources, rows = np.empty(count, np.int64), np.empty(count, np.int64)
        filled = 0
        while filled < count:
            number, inside = self._locate(row + filled)
            block, offset = divmod(inside, BLOCK)
            take = min(count - filled, BLOCK - offset, self._length(number) - inside)
            before = self._parts[number][2] + _apportion(self._parts[number][1], block * BLOCK)
            drawn, nth = (array[offset : offset + take] for array in self._block(number, block))
            sources[filled : filled + take] = drawn
            rows[filled : filled + take] = before[drawn] + nth
            filled += take
        return sources, rows

    def seen(self, row: int) -> NDArray[np.int64]:
        """Rows of each source before this row of the run, counted over all epochs: [sources]."""
        if row <= self.origin.row:
            return np.array(self.origin.seen, np.int64)
        number, inside = self._locate(row)
        return self._parts[number][2] + self._count(number, inside)

    def _locate(self, row: int) -> tuple[int, int]:
        """The phase that contains a row of the run, and the row's offset in it."""
        assert row >= self.origin.row, (row, self.origin)
        number = max(n for n, (begin, _, _) in enumerate(self._parts) if begin <= row)
        return number, row - self._parts[number][0]

    def _length(self, number: int) -> int:
        """Rows in a phase; the last has no end."""
        following = self._parts[number + 1 : number + 2]
        return following[0][0] - self._parts[number][0] if following else 1 << 62

    def _count(self, number: int, rows: int) -> NDArray[np.int64]:
        """Rows of each source among the first `rows` of a phase."""
        block, offset = divmod(rows, BLOCK)
        counted = np.bincount(self._block(number, block)[0][:offset], minlength=len(self.names)) if offset else 0
        return _apportion(self._parts[number][1], block * BLOCK) + counted

    def _block(self, number: int, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The source of each row in a block of a phase, and how many of that source come before it in the block.

        Each source is spread evenly over the block, with jitter from the seed.
        """
        found = self._blocks.get((number, block))
        if found is None:
            begin, shares, _ = self._parts[number]
            counts = _apportion(shares, (block + 1) * BLOCK) - _apportion(shares, block * BLOCK)
            nth = np.concatenate([np.arange(count) for count in counts])
            jitter = [
                uniform(count, self._seed, begin, block, name)
                for count, name in zip(counts.tolist(), self.names, strict=True)
            ]
            drawn = np.repeat(np.arange(len(counts)), counts)
            order = np.argsort((nth + np.concatenate(jitter)) / counts[drawn], kind="stable")
            found = drawn[order], nth[order]
            # One thread reads and another saves the position. A new dict is safe: at worst both draw the same block.
            self._blocks = {**dict(list(self._blocks.items())[-3:]), (number, block): found}
        return found


def _check(names: Sequence[str], phases: Sequence[Phase]) -> None:
    if not phases or phases[0].from_tokens != 0:
        problem = "the first phase of the mixture does not begin at 0 tokens"
        raise DatasetError(problem, remedy="set its from_tokens to 0", id="first-phase")
    for earlier, later in itertools.pairwise(phases):
        if later.from_tokens <= earlier.from_tokens:
            raise DatasetError(
                f"a phase at {later.from_tokens:,} tokens follows one at {earlier.from_tokens:,}",
                remedy="sort the phases by from_tokens",
                id="phase-order",
            )
    for phase in phases:
        where = f"phase at {phase.from_tokens:,} tokens: "
        if unknown := sorted(set(phase.weights) - set(names)):
            problem = f"{where}weights for unknown sources: {', '.join(unknown)}"
            raise DatasetError(problem, remedy=f"sources: {', '.join(names)}", id="weight-of-unknown-source")
        total = sum(phase.weights.values())
        if not 0 < total < math.inf or min(phase.weights.values()) < 0:
            problem = f"{where}weights {dict(phase.weights)}"
            raise DatasetError(problem, remedy="use finite weights of 0 or more, not all 0", id="impossible-weights")
        for name, weight in phase.weights.items():
            if 0 < weight < total / BLOCK:
                problem = f"{where}weight {weight} of {name} is under 1/{BLOCK} of the sum"
                raise DatasetError(problem, remedy="raise it, or set it to 0", id="weight-too-small")
    if forgotten := sorted(set(names) - {name for phase in phases for name in phase.weights}):
        raise DatasetError(
            f"no phase has a weight for {', '.join(forgotten)}: none of it would be read",
            remedy="name it in a phase (with 0, if that is intended), or leave the source out",
            id="source-without-weight",
        )


def _shares(weights: list[float]) -> list[int]:
    """Weights as integers that sum to _UNIT."""
    total = sum(weights)
    shares = [round(weight / total * _UNIT) for weight in weights]
    shares[shares.index(max(shares))] += _UNIT - sum(shares)
    return shares


def _apportion(shares: list[int], rows: int) -> NDArray[np.int64]:
    """`rows` apportioned by largest remainder. Grows with `rows` in steps of BLOCK, as no share is under 1 / BLOCK."""
    counts = [share * rows // _UNIT for share in shares]
    order = sorted(range(len(shares)), key=lambda i: (-(shares[i] * rows % _UNIT), i))
    for i in order[: rows - sum(counts)]:
        counts[i] += 1
    return np.array(counts, np.int64)
