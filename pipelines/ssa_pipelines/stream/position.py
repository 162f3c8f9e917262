"""A stream's position as plain values for a checkpoint, and back.

The position is one number. It is saved with all that it depends on: fingerprints of the data, seed, shuffle, weights, and
digests of the order that follows. It refuses to continue on anything else, naming every difference, unless a reason is
given; the reason is kept.
"""

import hashlib
from typing import TYPE_CHECKING

import numpy as np

from ssa_pipelines.errors import DatasetMismatch
from ssa_pipelines.stream.mixture import Origin

if TYPE_CHECKING:
    from ssa_pipelines.stream.train_stream import TrainStream

STATE_FORMAT = 2


def save(stream: "TrainStream") -> dict:
    """The state of a stream; see TrainStream.state_dict."""
    position, rows = stream.samples_seen, stream.rows
    seen = rows.mixture.seen(position).tolist()
    return {
        "format": STATE_FORMAT,
        "samples_seen": position,
        **_depends_on(stream),
        "rows_seen": dict(zip(rows.names, seen, strict=True)),
        "origin": {
            "row": rows.mixture.origin.row,
            "seen": dict(zip(rows.names, rows.mixture.origin.seen, strict=True)),
        },
        "digests": _digests(stream, position),
        "changes": stream.changes,
    }


def restore(stream: "TrainStream", state: dict, reason: str | None) -> None:
    """Moves a stream to where `state` was taken; see TrainStream.load_state_dict."""
    position = state.get("samples_seen")
    if state.get("format") != STATE_FORMAT or not isinstance(position, int) or position < 0:
        raise DatasetMismatch(
            f"saved position: format {state.get('format')}, samples_seen {position}, not format {STATE_FORMAT}",
            remedy="resume from a checkpoint written by this version",
            id="position-format",
        )
    differences = _differences(state, _depends_on(stream))
    before = stream.rows.mixture.origin
    if differences:
        if not (reason and reason.strip()):
            raise DatasetMismatch(
                "saved position: " + "; ".join(differences),
                remedy="resume with the data, weights, seed and shuffle of the checkpoint, start a new run, or continue "
                "with data.accept_changes=REASON",
                id="position-of-other-data",
            )
        same_order = all(state.get(field) == value for field, value in stream.order.items())
        datasets = state.get("datasets", {})
        seen = tuple(
            int(state["rows_seen"][name]) if same_order and datasets.get(name) == info.fingerprint else 0
            for name, info in stream.infos.items()
        )
        stream.rows.begin_at(Origin(position, seen))
        change = {"samples_seen": position, "reason": reason.strip(), "differences": differences}
        stream.changes = [*state.get("changes", []), change]
    else:
        origin = state["origin"]
        stream.rows.begin_at(Origin(origin["row"], tuple(origin["seen"][name] for name in stream.rows.names)))
        digests = _digests(stream, position)
        if digests != state.get("digests"):
            stream.rows.begin_at(before)
            raise DatasetMismatch(
                f"saved position: order is {state.get('digests')} in the checkpoint, {digests} here",
                remedy="resume with the version of mosaicml-streaming and numpy that began the run",
                id="order-changed",
            )
        stream.changes = list(state.get("changes", []))
    stream.samples_seen = position


def _depends_on(stream: "TrainStream") -> dict:
    return {
        "split": stream.split,
        **stream.order,
        "datasets": {name: info.fingerprint for name, info in stream.infos.items()},
        "phases": [[phase.from_tokens, dict(sorted(phase.weights.items()))] for phase in stream.rows.phases],
    }


def _differences(state: dict, own: dict) -> list[str]:
    found = []
    for field, value in own.items():
        saved = state.get(field)
        if field == "datasets":
            for name in sorted({*(saved or {}), *value}):
                before, now = (saved or {}).get(name), value.get(name)
                if before != now:
                    label = f"dataset of source {name}" if name else "dataset"
                    found.append(f"{label} is {before or 'absent'} in the checkpoint, {now or 'absent'} here")
        elif saved != value:
            found.append(f"{field} is {saved} in the checkpoint, {value} here")
    return found


def _digests(stream: "TrainStream", position: int) -> dict[str, str]:
    """Digests of the order that follows: per source that of its epoch, and that of the sources of the next rows."""
    rows, seen = stream.rows, stream.rows.mixture.seen(position)
    digests = {name: order.digest(int(n)) for name, order, n in zip(rows.names, rows.orders, seen, strict=True)}
    sources, _ = rows.mixture.at(position, 1024)
    mixed = hashlib.blake2b(np.ascontiguousarray(sources, "<i8").data, digest_size=16).hexdigest()
    return {**digests, "mixture": mixed} if len(rows.names) > 1 else digests
