"""Heat maps as inline SVG text: a grid of cells, each as strong as its value, with the value in it where there is room.

A scale above the cells says what pale and full mean. Colours come from the page's style sheet by class, as in svg.py. A value
that is missing or not finite is an empty cell.
"""

from collections.abc import Sequence
from html import escape

from ssa_megatron.report.svg import is_finite

LEFT, TOP, BOTTOM = 46, 22, 34
ROOM = 27  # units of width from which on a cell holds its value


def heat_map(
    rows: Sequence[Sequence[float | None]],
    *,
    x: Sequence[str],
    y: Sequence[str],
    x_label: str,
    y_label: str,
    label: str,
    role: str,
    low: float,
    high: float,
    width: int = 400,
    cell_height: int = 22,
) -> str:
    """An `<svg>` element: `rows[i][j]` in row `y[i]` and column `x[j]`, empty at `low` and full at `high`."""
    step = (width - LEFT - 18) / max(1, len(x))
    height = TOP + cell_height * len(rows) + BOTTOM
    parts = [
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" xmlns="http://www.w3.org/2000/svg">',
        f'<text class="unit" x="4" y="13">{escape(y_label)}</text>',
        *_scale(low, high, role, right=width - 18),
    ]
    for i, (name, row) in enumerate(zip(y, rows, strict=True)):
        top = TOP + i * cell_height
        parts.append(f'<text class="tick end" x="{LEFT - 7}" y="{top + cell_height / 2 + 4:.1f}">{escape(name)}</text>')
        for j, (column, value) in enumerate(zip(x, row, strict=True)):
            if value is not None and is_finite(value):
                says = f"{x_label} {column}, {y_label} {name}: {value:.4g}"
                place = (LEFT + j * step, top, step, cell_height)
                parts += _cell(place, value, min(1.0, max(0.0, (value - low) / ((high - low) or 1.0))), role, says)
    every = -(-len(x) * 30 // (width - LEFT - 18))  # a label needs 30 units
    for j in range(0, len(x), max(1, every)):
        at = LEFT + (j + 0.5) * step
        parts.append(f'<text class="tick middle" x="{at:.1f}" y="{height - BOTTOM + 16}">{escape(x[j])}</text>')
    parts.append(f'<text class="unit end" x="{width - 18}" y="{height - 3}">{escape(x_label)}</text>')
    return "\n".join((*parts, "</svg>"))


def _scale(low: float, high: float, role: str, *, right: float) -> list[str]:
    """What the colours mean, above the cells: from the value that is empty to the one that is full."""
    steps, size, left = 6, 11, right - 34 - 6 * 11
    boxes = (
        f'<rect class="cell {role}" x="{left + i * size}" y="5" width="{size}" height="9" '
        f'fill-opacity="{_strength(i / (steps - 1))}"/>'
        for i in range(steps)
    )
    ends = ((left - 5, "end", low), (left + steps * size + 5, "", high))
    return [*boxes, *(f'<text class="tick {side}" x="{x}" y="13">{_short(value)}</text>' for x, side, value in ends)]


def _strength(share: float) -> str:
    return f"{0.04 + 0.96 * share:.3f}"


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.3g}"


def _cell(place: tuple[float, float, float, float], value: float, share: float, role: str, says: str) -> list[str]:
    left, top, width, height = place
    rectangle = f'x="{left:.1f}" y="{top:.1f}" width="{width - 1:.1f}" height="{height - 1:.1f}"'
    cell = [
        f'<rect class="cell {role}" {rectangle} fill-opacity="{_strength(share)}"><title>{escape(says)}</title></rect>'
    ]
    if width >= ROOM:
        # where paper is easier to read than ink: on full colours in both schemes, on middling ones in the dark scheme alone
        ink = "in" if share > 0.78 else "mid" if share > 0.58 else "out"
        middle = f'x="{left + width / 2:.1f}" y="{top + height / 2 + 4:.1f}"'
        cell.append(f'<text class="value middle {ink}" {middle}>{_short(value)}</text>')
    return cell
