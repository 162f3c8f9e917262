"""The figures of a run's report: which curves there are, what each axis means, and what is said where a curve is missing.

Every number shown is one that metrics.jsonl holds (means over steps are named as such). A series that is absent, short or
non-finite becomes a sentence, never an error.
"""

import math
from html import escape
from typing import TypeGuard

from ssa_megatron.config import Recipe
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.report.svg import Layer, Points, chart, is_finite, power_of_ten

_SMALL, _WIDE, _NARROW = (400, 214), (940, 330), (400, 290)
_SMOOTHED_FROM = 40  # steps; below it every step is drawn at full strength


def figures(recipe: Recipe, lines: list[dict], extra: dict) -> str:
    """All curves as HTML: the losses at full width, then six smaller panels."""
    if not lines:
        return '<p class="absent">No step has been recorded yet: metrics.jsonl is missing or empty.</p>'
    panels = (
        _alignment(recipe, lines),
        _sparsity(recipe, lines),
        _entropy(recipe, lines),
        _grad_norm(recipe, lines),
        _learning_rate(recipe, lines),
        _throughput(lines),
    )
    drawn_first = sorted(panels, key=lambda panel: "<svg" not in panel)  # a missing curve leaves no hole in the grid
    return _losses(lines, extra) + f'<div class="panels">{"".join(drawn_first)}</div>'


def series(lines: list[dict], name: str) -> Points:
    """(step, value) where the line has a number under `name`; non-finite ones stay."""
    return [(line["step"], float(line[name])) for line in lines if _is_number(line.get(name))]


def last_finite(points: Points) -> float | None:
    return next((y for _, y in reversed(points) if is_finite(y)), None)


def short(value: float | None) -> str:
    """Four significant digits as people write them; an em dash for None."""
    if value is None:
        return "—"
    if not is_finite(value):
        return "not finite"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        exponent = math.floor(math.log10(abs(value)))
        return f"{value / 10.0**exponent:.2f}·{power_of_ten(exponent)}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def smoothed(points: Points, window: int) -> Points:
    """Centred mean of the finite values among `window` neighbours; NaN where there is none.

    Near the ends the window shrinks on both sides, so that a falling curve does not seem to start lower than it does; where
    it would shrink below a quarter, a mean would be as noisy as the steps, and there is no point.
    """
    reach, sums, counts = window // 2, [0.0], [0]
    for _, y in points:
        sums.append(sums[-1] + (y if is_finite(y) else 0.0))
        counts.append(counts[-1] + is_finite(y))
    means = []
    for i, (x, _) in enumerate(points):
        half = min(reach, i, len(points) - 1 - i)
        if half < reach // 4:
            continue
        first, last = i - half, i + half + 1
        count = counts[last] - counts[first]
        means.append((x, (sums[last] - sums[first]) / count if count else math.nan))
    return means


def _losses(lines: list[dict], extra: dict) -> str:
    steps = series(lines, "loss")
    layers, legend = _curve(steps, "train", "training, each step")
    for name, mark, text in (
        ("loss_full", "dot", "held out, full attention"),
        ("loss_sparse", "ring", "held out, sparse attention"),
        ("loss", "dot", "held out"),
    ):
        points = series(lines, f"eval/{name}")
        role = "sparse" if name == "loss_sparse" else "full"
        if any(is_finite(y) for _, y in points):
            layers.append(Layer(points, mark, role, name))
            legend.append((f"{mark} {role}", text))
    rules, verticals = [], []
    if (entropy := _positive(extra.get("unigram_entropy"))) is not None:
        rules.append(entropy)
        legend.append(("rule", f"unigram entropy, {entropy:.4f}"))
    resume = extra.get("resume")
    if isinstance(resume, dict) and (killed := _positive(resume.get("killed_at_step"))) is not None:
        verticals.append(killed)
        legend.append(("vertical", f"killed at step {killed:,.0f}"))
    drawing = {
        "layers": layers,
        "label": "Cross-entropy over steps",
        "y_label": "nats per token",
        "rules": rules,
        "verticals": verticals,
    }
    note = "" if any(layer.role != "train" for layer in layers) else "No evaluation has run yet: no held-out points."
    return _figure("Cross-entropy", drawing, steps, legend, note=note, sizes={"wide": _WIDE, "narrow": _NARROW})


def _alignment(recipe: Recipe, lines: list[dict]) -> str:
    if not kind_of(recipe).aligned:
        return absence("Alignment loss", f"Attention of kind {recipe.attention.kind} has no alignment loss.")
    points = series(lines, "alignment")
    layers, legend = _curve(points, "train", "training, each step, not weighted")
    held_out = series(lines, "eval/alignment")
    if any(is_finite(y) for _, y in held_out):
        layers.append(Layer(held_out, "dot", "full", "held out"))
        legend.append(("dot full", "held out"))
    drawing = {"layers": layers, "label": "Alignment loss over steps", "y_label": "mean over elements", "log_above": 8}
    return _figure("Alignment loss", drawing, points, legend)


def _sparsity(recipe: Recipe, lines: list[dict]) -> str:
    attention = recipe.attention
    field = attention.block_size * attention.block_count
    return _evaluated(
        recipe, lines, "sparsity", "Sparsity",
        y_label="share of attention mass",
        legend=f"full-attention mass inside the selected blocks ({field:,} tokens)",
    )  # fmt: skip


def _entropy(recipe: Recipe, lines: list[dict]) -> str:
    return _evaluated(
        recipe,
        lines,
        "entropy",
        "Attention entropy",
        y_label="nats",
        legend="full attention, mean over tokens and heads",
    )


def _evaluated(recipe: Recipe, lines: list[dict], name: str, title: str, *, y_label: str, legend: str) -> str:
    points = series(lines, f"eval/{name}")
    if not any(is_finite(y) for _, y in points):
        interval = recipe.train.eval_interval
        why = f"the first is due at step {interval:,}" if interval else "train.eval_interval is 0"
        return absence(title, "Evaluated, but never finite." if points else f"No evaluation has run yet: {why}.")
    if all(y == 0 for _, y in points):
        return absence(title, f"Not measured for attention of kind {recipe.attention.kind}.")
    drawing = {
        "layers": [Layer(points, "line", "sparse"), Layer(points, "dot", "sparse", name)],
        "label": f"{title} over steps",
        "y_label": y_label,
    }
    return _figure(title, drawing, points, [("dot sparse", legend)])


def _grad_norm(recipe: Recipe, lines: list[dict]) -> str:
    points = series(lines, "grad_norm")
    layers, legend = _curve(points, "train", "each step, before clipping")
    clip = recipe.optimizer.clip_grad_norm
    near = [clip] if clip and any(is_finite(y) and y > clip / 20 for _, y in points) else []
    if near:
        legend.append(("rule", f"clipped at {clip:g}"))
    drawing = {
        "layers": layers,
        "label": "Gradient norm over steps",
        "y_label": "global norm",
        "log_above": 12,
        "rules": near,
    }
    return _figure("Gradient norm", drawing, points, legend)


def _learning_rate(recipe: Recipe, lines: list[dict]) -> str:
    points = series(lines, "lr")
    legend = f"{recipe.schedule.kind} schedule, peak {recipe.optimizer.lr:g}"
    drawing = {
        "layers": [Layer(points, "line", "train")],
        "label": "Learning rate over steps",
        "y_label": "learning rate",
        "zero": True,
    }
    return _figure("Learning rate", drawing, points, [("line train", legend)])


def _throughput(lines: list[dict]) -> str:
    points = series(lines, "tokens_per_second")
    layers, legend = _curve(points, "train", "all processes, over the last 20 steps")
    drawing = {
        "layers": layers,
        "label": "Throughput over steps",
        "y_label": "tokens/s",
        "zero": True,
    }
    return _figure("Throughput", drawing, points, legend)


def _curve(points: Points, role: str, name: str) -> tuple[list[Layer], list[tuple[str, str]]]:
    """Layers and legend of a noisy series: every step faint and a mean over it, or every step alone when there are few."""
    if len(points) < _SMOOTHED_FROM:
        return [Layer(points, "line", role)], [(f"line {role}", name)]
    window = min(201, len(points) // 60 * 2 + 3)
    return (
        [Layer(points, "thin", role), Layer(smoothed(points, window), "line", role)],
        [(f"thin {role}", name), (f"line {role}", f"mean of {window:,} steps")],
    )


def _figure(
    title: str, drawing: dict, points: Points, legend: list[tuple[str, str]], *, note: str = "",
    sizes: dict[str, tuple[int, int]] | None = None,
) -> str:  # fmt: skip
    crosses = [(x, f"step {x:,}: not finite") for x, y in points if not is_finite(y)]
    drawings = {
        name: chart(**drawing, width=width, height=height, x_label="step", crosses=crosses)
        for name, (width, height) in (sizes or {"": _SMALL}).items()
    }
    if not all(drawings.values()):
        return absence(title, "Recorded, but never finite." if points else "Not in metrics.jsonl.")
    if crosses:
        count = f"{len(crosses):,} step{'s' if len(crosses) > 1 else ''}"
        legend = [*legend, ("cross", f"{count} not finite")]
    return framed(title, drawings, legend, note=note, last=short(last_finite(points)))


def framed(
    title: str, drawings: dict[str, str], legend: list[tuple[str, str]], *, note: str = "", last: str = ""
) -> str:
    """A figure: `drawings` (SVG by CSS class), under their title and a legend of (mark and role, text)."""
    keys = "".join(f"<li>{swatch(kind)}{escape(text)}</li>" for kind, text in legend)
    shapes = "".join(f'<div class="drawing {name}">{svg}</div>' for name, svg in drawings.items())
    tail = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f"<figure><figcaption><h3>{escape(title)}</h3>"
        f'<span class="last">{escape(last)}</span></figcaption>'
        f'<ul class="legend">{keys}</ul>{shapes}{tail}</figure>'
    )


def swatch(kind: str) -> str:
    """The sign of a layer of this mark and role, for a legend."""
    return f'<svg class="swatch" viewBox="0 0 18 12" aria-hidden="true" xmlns="http://www.w3.org/2000/svg">{mark(kind)}</svg>'


def mark(kind: str) -> str:
    """The shapes of a swatch, in a box of 18 x 12."""
    name, _, role = kind.partition(" ")
    return {
        "dot": f'<circle class="dot {role}" cx="9" cy="6" r="2.6"/>',
        "ring": f'<circle class="ring {role}" cx="9" cy="6" r="4.6"/>',
        "cross": '<path class="cross" d="M6 3l6 6m0 -6l-6 6"/>',
        "vertical": '<line class="vertical" x1="9" y1="0" x2="9" y2="12"/>',
    }.get(name, f'<line class="{kind}" x1="0" y1="6" x2="18" y2="6"/>')


def absence(title: str, why: str) -> str:
    """A figure that could not be drawn, and why."""
    return f'<figure><figcaption><h3>{escape(title)}</h3></figcaption><p class="absent">{escape(why)}</p></figure>'


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: object) -> float | None:
    return float(value) if _is_number(value) and is_finite(float(value)) and value > 0 else None
