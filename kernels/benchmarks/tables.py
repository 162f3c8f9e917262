"""Rows of the benchmark as the Markdown tables of docs/performance.md: contenders down, shapes across, medians over the runs.

A cell is forward / forward+backward in milliseconds; a refusal or a failed accuracy gate stands in its cell.
"""

from collections.abc import Iterable
from statistics import median


def times(rows: Iterable[dict], selection: str = "random") -> str:
    """One table of the rows of one kind of selection, with the Jaccard of neighbours' sets in the head."""
    cells: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["selection"] == selection:
            cells.setdefault((row["what"], row["shape"]), []).append(row)
    if not cells:
        return ""
    shapes = list(dict.fromkeys(shape for _, shape in cells))
    jaccard = {shape: some[0]["jaccard"] for (_, shape), some in cells.items()}
    heads = [f"{shape} (J {jaccard[shape]:.2f})" for shape in shapes]
    lines = [f"| {selection} | " + " | ".join(heads) + " |", "|---" * (len(shapes) + 1) + "|"]
    for what in dict.fromkeys(what for what, _ in cells):
        lines.append(f"| {what} | " + " | ".join(cell(cells.get((what, shape), [])) for shape in shapes) + " |")
    return "\n".join(lines)


def cell(rows: list[dict]) -> str:
    if not rows:
        return ""
    notes = {row["note"].split(":")[0] for row in rows if row["note"]}
    if notes:
        return f"**{', '.join(sorted(notes))}**"
    both = f" / {median(row['both_ms'] for row in rows):.3g}" if "both_ms" in rows[0] else ""
    return f"{median(row['forward_ms'] for row in rows):.3g}{both}"
