"""Time and memory against sequence length, as one SVG file of two log-log panels, written by hand: no library draws it.

`benchmarks.attention --picture` draws what it has measured; `python -m benchmarks.picture ROWS.csv OUT.svg` the rows of a file.
Colours are fixed and the paper is white, so that it reads the same on light and dark pages; its first lines say what was
measured, on what and when. It draws what it is given and leaves out lengths that a contender did not run.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path

LINES = {  # contender -> (colour, legend)
    "SDPA flash": ("#9a9a9a", "full attention, SDPA flash"),
    "SDPA cudnn": ("#444444", "full attention, SDPA cuDNN"),
    "our dense": ("#c77d0a", "full attention, our Triton kernel"),
    "SSA, trunk full": ("#1668b8", "SSA, routing, gate and loss in"),
    "sparse with routing": ("#1f8f4e", "sparse stream with routing"),
}
WIDTH, HEIGHT, TOP, BOTTOM = 960, 470, 78, 400
PANELS = ((64, 460, "both_ms", "forward + backward, ms"), (544, 940, "peak_mib", "memory above the inputs, MiB"))
FONT = "font-family='Helvetica, Arial, sans-serif'"


def draw(rows: Iterable[dict], common: dict) -> str:
    """rows: of `benchmarks.attention --picture`; `common`: date, device, torch, triton, commit. Several runs: the median."""
    points: dict[str, dict[str, dict[int, float]]] = {panel[2]: {} for panel in PANELS}
    kept = [row for row in rows if row["what"] in LINES and not row["note"]]
    for column, lines in points.items():
        for shape, what in {(row["shape"], row["what"]) for row in kept}:
            values = [row[column] for row in kept if (row["shape"], row["what"]) == (shape, what) and column in row]
            if values:
                lines.setdefault(what, {})[int(shape.split()[1].rstrip("k")) * 1024] = statistics.median(values)
    said = (
        "SSA attention, one layer: 32 query / 2 KV heads, D 64, batch 1, bf16, blocks of 16, 16 selected, random inputs"
    )
    where = f"{common['device']}, torch {common['torch']}, Triton {common['triton']}, {common['date']}, commit {common['commit']}"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{escape(said)}' {FONT}>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
        f"<text x='24' y='24' font-size='15' font-weight='bold' fill='#222'>{escape(said)}</text>",
        f"<text x='24' y='43' font-size='12' fill='#666'>{escape(where)}</text>",
    ]
    for left, right, column, title in PANELS:
        parts += panel(points[column], left, right, title)
    parts += legend()
    return "\n".join([*parts, "</svg>"]) + "\n"


def panel(lines: dict[str, dict[int, float]], left: float, right: float, title: str) -> Iterator[str]:
    """One log-log panel: lengths double along x; y runs over whole powers of ten."""
    values = [y for line in lines.values() for y in line.values() if y > 0]
    if not values:
        return
    lengths = sorted({n for line in lines.values() for n in line})
    low, high = (math.log10(end) for end in ends(min(values), max(values)))

    def at(n: float, y: float) -> tuple[float, float]:
        across = math.log(n / lengths[0]) / math.log(max(2, lengths[-1] / lengths[0]))
        up = (math.log10(y) - low) / (high - low)
        return left + across * (right - left), BOTTOM - up * (BOTTOM - TOP)

    yield f"<text x='{left}' y='{TOP - 10}' font-size='13' fill='#222'>{escape(title)}, log scale</text>"
    for power in range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1):
        _, y = at(lengths[0], 10.0**power)
        yield f"<line x1='{left}' y1='{y:.1f}' x2='{right}' y2='{y:.1f}' stroke='#ddd'/>"
        label = f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"
        yield f"<text x='{left - 7}' y='{y + 4:.1f}' font-size='12' text-anchor='end' fill='#555'>{label}</text>"
    for n in lengths:
        x, _ = at(n, min(values))
        yield f"<line x1='{x:.1f}' y1='{BOTTOM}' x2='{x:.1f}' y2='{BOTTOM + 5}' stroke='#555'/>"
        yield f"<text x='{x:.1f}' y='{BOTTOM + 19}' font-size='12' text-anchor='middle' fill='#555'>{n // 1024}k</text>"
    for what, (colour, _) in LINES.items():
        placed = [(*at(n, y), n, y) for n, y in sorted(lines.get(what, {}).items()) if y > 0]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in placed)
        yield f"<polyline points='{path}' fill='none' stroke='{colour}' stroke-width='2'/>"
        for x, y, n, value in placed:
            says = escape(f"{what}, {n // 1024}k tokens: {value:.4g}")
            yield f"<circle cx='{x:.1f}' cy='{y:.1f}' r='3' fill='{colour}'><title>{says}</title></circle>"


def ends(low: float, high: float) -> tuple[float, float]:
    """The nearest 1, 2 or 5 times a power of ten at or outside both ends."""
    steps = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
    return max(s for s in steps if s <= low), min(s for s in steps if s > high)


def legend() -> Iterator[str]:
    """One row of names below the panels, in the order of LINES, and what the x axis is."""
    x = 24.0
    for colour, text in LINES.values():
        yield f"<line x1='{x:.0f}' y1='446' x2='{x + 16:.0f}' y2='446' stroke='{colour}' stroke-width='3'/>"
        yield f"<text x='{x + 21:.0f}' y='450' font-size='11' fill='#222'>{escape(text)}</text>"
        x += 34 + 5.3 * len(text)
    for _, right, _, _ in PANELS:
        yield f"<text x='{right}' y='{BOTTOM + 34}' font-size='11' text-anchor='end' fill='#555'>tokens, log scale</text>"


def read(path: Path) -> tuple[list[dict], dict]:
    """(rows, common) as `draw` takes them, from a CSV file of the benchmark; an empty cell is a column that the row lacks."""
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))
    rows = [
        {"shape": row["shape"], "what": row["what"], "note": row["note"]}
        | {column: float(row[column]) for _, _, column, _ in PANELS if row[column]}
        for row in found
    ]
    return rows, found[0]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("rows", type=Path, help="what `benchmarks.attention --picture --out` wrote")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    a = parser.parse_args()
    a.picture.write_text(draw(*read(a.rows)))


if __name__ == "__main__":
    main()
