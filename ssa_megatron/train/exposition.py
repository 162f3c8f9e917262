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
        temporary.write_text(text(run.resolve().name, values))
        temporary.replace(run / FILE)


def text(name: str, values: dict) -> str:
    """The exposition; `name` labels the run."""
    label = name.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    lines = []
    for key, value in values.items():
        if isinstance(value, int | float):
            metric = "ssa_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in key)
            lines += [f"# TYPE {metric} gauge", f'{metric}{{run="{label}"}} {_number(value)}']
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(float(value))
