"""RUN/metrics.prom: the newest figures in Prometheus' text format, for node_exporter's textfile collector.

Whole or not there, and never a reason to stop: what cannot be written is left out until the next time.
"""

import contextlib
import math
from pathlib import Path

FILE = "metrics.prom"


def write(run: Path, values: dict) -> None:
    """values: one line of metrics.jsonl with the run's `step`; numbers become gauges named ssa_*."""
    temporary = run / f".tmp-{FILE}"
    with contextlib.suppress(OSError):
        temporary.write_text(text(run.resolve(), values))
        temporary.replace(run / FILE)


def text(run: Path, values: dict) -> str:
    """The exposition. Its labels are the run's name and folder: two runs of one name on a machine are two series."""
    labels = f'run="{_escaped(run.name)}",folder="{_escaped(str(run))}"'
    gauges = {}
    for key, value in values.items():
        if isinstance(value, int | float):
            gauges["ssa_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in key)] = value
    lines = []
    for name, value in gauges.items():
        # without a HELP node_exporter makes up one with the file's name, and refuses a second run whose HELP differs
        lines += [
            f"# HELP {name} In metrics.jsonl of the run.",
            f"# TYPE {name} gauge",
            f"{name}{{{labels}}} {_number(value)}",
        ]
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
