"""Line charts as inline SVG text: linear and logarithmic axes with round ticks, lines, points, rules and crosses.

Every finite value drawn lies inside its axes, and colours come from the page's style sheet by class, so one drawing serves light,
dark and print. It draws no non-finite value, keeps a long series to a bounded number of points, and knows nothing about runs.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]
"""(x, y), x rising; a non-finite y is a gap."""

_HUGE = 1e100  # beyond it, arithmetic on axes overflows; such a value is as good as infinite
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Layer:
    """One series. `mark`: line, thin (a faint line), dot or ring; `role`: the CSS class that colours it."""

    points: Points
    mark: str
    role: str
    name: str = ""
    """Said when the pointer rests on a dot or ring."""


@dataclass(frozen=True)
class Axis:
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    unit: str = ""
    """A power of ten taken out of the tick labels, e.g. `×10⁻³`."""
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between the ends: 0 at `low`, 1 at `high`."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Frame:
    """The plotting area inside the picture, and the axes that map to it."""

    left: float
    right: float
    top: float
    bottom: float
    x: Axis
    y: Axis
    x_label: str

    def place(self, x: float, y: float) -> tuple[float, float]:
        return (
            self.left + self.x.share(x) * (self.right - self.left),
            self.bottom - self.y.share(y) * (self.bottom - self.top),
        )


def is_finite(value: float) -> bool:
    """Whether a chart can show `value`."""
    return math.isfinite(value) and abs(value) < _HUGE


def chart(
    layers: Sequence[Layer],
    *,
    width: int,
    height: int,
    label: str,
    x_label: str,
    y_label: str,
    log_above: float = math.inf,
    zero: bool = False,
    rules: Iterable[float] = (),
    verticals: Iterable[float] = (),
    crosses: Sequence[tuple[float, str]] = (),
    x_axis: Axis | None = None,
) -> str:
    """An `<svg>` element, or "" when no layer holds a finite value. Sizes are in units of the view box.

    The y axis is logarithmic when all values are positive and largest / smallest exceeds `log_above`, and starts at 0 with
    `zero`. `rules` are dashed horizontals, `verticals` dotted, `crosses` (x, what to say) mark steps at the upper edge.
    Without `x_axis`, x runs linearly from 0 over whole numbers.
    """
    rules, verticals = [rule for rule in rules if is_finite(rule)], list(verticals)
    values = [y for layer in layers for _, y in layer.points if is_finite(y)]
    if not values:
        return ""
    reach = [*values, *rules, *([0.0] if zero else [])]
    xs = [x for layer in layers for x, _ in layer.points] + verticals + [x for x, _ in crosses]
    low, high = min(reach), max(reach)
    log = low > 0 and high / low > log_above
    y_axis = log_axis(low, high) if log else linear_axis(low, high, ticks=max(3, height // 62))
    x_axis = x_axis or linear_axis(0, max(1.0, *xs), ticks=max(3, width // 95), whole=True, extend=False)
    frame = _Frame(50, width - 18, 26, height - 34, x_axis, y_axis, x_label)
    title = f"{y_label} {y_axis.unit}".strip() + (", log scale" if log else "")
    return "\n".join(
        (
            f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}" '
            'xmlns="http://www.w3.org/2000/svg">',
            *_axes(frame, x_label, title),
            *(_segment("rule", frame, (x_axis.low, rule), (x_axis.high, rule)) for rule in rules),
            *(_segment("vertical", frame, (x, y_axis.low), (x, y_axis.high)) for x in verticals),
            *(piece for layer in layers for piece in _layer(layer, frame)),
            *(_cross(frame, x, text) for x, text in _apart(crosses, frame)),
            "</svg>",
        )
    )


def linear_axis(low: float, high: float, *, ticks: int, whole: bool = False, extend: bool = True) -> Axis:
    """About `ticks` ticks at multiples of 1, 2 or 5; `extend` moves the ends out to ticks; `whole` allows integers only."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = low - (abs(low) * 0.1 or 1.0), high + (abs(high) * 0.1 or 1.0)
    step = _round_up((high - low) / ticks)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    at = [k * step for k in range(first, last + 1)]
    if extend:
        low, high = at[0], at[-1]
    largest = max(abs(low), abs(high))
    power = math.floor(math.log10(largest))
    power = power // 3 * 3 if largest >= 1e5 else power if largest < 0.01 else 0
    decimals = max(0, -math.floor(math.log10(step / 10**power) + 1e-9))
    labels = ((t, f"{t / 10**power:,.{decimals}f}") for t in at if low <= t <= high * (1 + 1e-12))
    return Axis(low, high, tuple(labels), unit=f"×{power_of_ten(power)}" if power else "")


def log_axis(low: float, high: float) -> Axis:
    """Ends at 1, 2 or 5 times a power of ten; ticks there too, or at powers of ten alone when there are many."""
    first, last = math.floor(math.log10(low) + 1e-12), math.ceil(math.log10(high) - 1e-12)
    steps = [(m, e) for e in range(first - 1, last + 1) for m in (1, 2, 5)]
    start = max(i for i, (m, e) in enumerate(steps) if m * 10.0**e <= low * (1 + 1e-12))
    end = min(i for i, (m, e) in enumerate(steps) if m * 10.0**e >= high * (1 - 1e-12))
    inside = steps[start : end + 1]
    if len(inside) > 7:
        decades = [pair for pair in inside if pair[0] == 1]
        shown = decades[:: math.ceil(len(decades) / 7)]
    else:
        shown = inside
    plain = low > 0.009 and high < 20000
    ticks = tuple((m * 10.0**e, f"{m * 10.0**e:,g}" if plain else _scientific(m, e)) for m, e in shown)
    return Axis(steps[start][0] * 10.0 ** steps[start][1], steps[end][0] * 10.0 ** steps[end][1], ticks, log=True)


def thinned(points: Points, buckets: int) -> Points:
    """At most two points a bucket, its lowest and its highest, so that no spike is lost; gaps stay gaps."""
    if len(points) <= 2 * buckets:
        return points
    kept = []
    for i in range(buckets):
        part = points[i * len(points) // buckets : (i + 1) * len(points) // buckets]
        finite = [p for p in part if is_finite(p[1])]
        ends = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])} if finite else {part[0]}
        kept += sorted(ends)
    return kept


def power_of_ten(exponent: int) -> str:
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def _scientific(mantissa: int, exponent: int) -> str:
    return power_of_ten(exponent) if mantissa == 1 else f"{mantissa}·{power_of_ten(exponent)}"


def _round_up(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if step <= m * power * (1 + 1e-9))


def _axes(frame: _Frame, x_label: str, y_label: str) -> Iterator[str]:
    for value, text in frame.y.ticks:
        _, y = frame.place(frame.x.low, value)
        yield f'<line class="grid" x1="{frame.left:.1f}" y1="{y:.1f}" x2="{frame.right:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick end" x="{frame.left - 7:.1f}" y="{y + 4:.1f}">{escape(text)}</text>'
    yield (
        f'<line class="axis" x1="{frame.left:.1f}" y1="{frame.bottom:.1f}" x2="{frame.right:.1f}" y2="{frame.bottom:.1f}"/>'
    )
    for value, text in frame.x.ticks:
        x, _ = frame.place(value, frame.y.high)
        yield f'<line class="axis" x1="{x:.1f}" y1="{frame.bottom:.1f}" x2="{x:.1f}" y2="{frame.bottom + 4:.1f}"/>'
        half = 3.4 * len(text)  # a label as wide as this stays inside the picture, whatever the font
        x = min(x, frame.right + 18 - half)
        yield f'<text class="tick middle" x="{x:.1f}" y="{frame.bottom + 17:.1f}">{escape(text)}</text>'
    unit = f" {frame.x.unit}" if frame.x.unit else ""
    yield f'<text class="unit end" x="{frame.right:.1f}" y="{frame.bottom + 31:.1f}">{escape(x_label + unit)}</text>'
    yield f'<text class="unit" x="4" y="13">{escape(y_label)}</text>'


def _segment(kind: str, frame: _Frame, start: tuple[float, float], end: tuple[float, float]) -> str:
    (x1, y1), (x2, y2) = frame.place(*start), frame.place(*end)
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _layer(layer: Layer, frame: _Frame) -> Iterator[str]:
    points = thinned(layer.points, int(frame.right - frame.left))
    if layer.mark in ("line", "thin"):
        for run in _runs(points):
            placed = [frame.place(*point) for point in run]
            if len(placed) == 1:
                yield f'<circle class="alone {layer.role}" cx="{placed[0][0]:.1f}" cy="{placed[0][1]:.1f}" r="2.4"/>'
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
                yield f'<polyline class="{layer.mark} {layer.role}" points="{path}"/>'
        return
    for x, y in points:
        if is_finite(y):
            where = f"{frame.x_label} {x:,.0f}" if x == int(x) else f"{frame.x_label} {x:.3g}"
            yield _point(layer, *frame.place(x, y), f"{layer.name} {y:.6g}, {where}".strip())


def _point(layer: Layer, x: float, y: float, says: str) -> str:
    shared = f'class="{layer.mark} {layer.role}"'
    title = f"<title>{escape(says)}</title>"
    radius = 4.6 if layer.mark == "ring" else 2.6
    return f'<circle {shared} cx="{x:.1f}" cy="{y:.1f}" r="{radius}">{title}</circle>'


def _cross(frame: _Frame, x: float, says: str) -> str:
    at, _ = frame.place(x, frame.y.high)
    d = f"M{at - 3:.1f} {frame.top - 9:.1f}l6 6m0 -6l-6 6"
    return f'<path class="cross" d="{d}"><title>{escape(says)}</title></path>'


def _apart(crosses: Sequence[tuple[float, str]], frame: _Frame) -> Iterator[tuple[float, str]]:
    """Crosses at least two units apart: a thousand skipped steps need no thousand marks."""
    previous = -math.inf
    for x, says in crosses:
        at, _ = frame.place(x, frame.y.high)
        if at - previous >= 2:
            previous = at
            yield x, says


def _runs(points: Points) -> Iterator[list[tuple[float, float]]]:
    """The points between gaps."""
    run = []
    for point in points:
        if is_finite(point[1]):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run
