"""report.html of an evaluation: every table and picture, all models side by side, on one page without network or script.

The pictures lie beside it as SVG files too. It shows only what results.json holds, and says at its top what keeps the models
from being comparable.
"""

import itertools
import math
import re
import time
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from ssa_megatron.evaluation.tables import Table, differences, setting, tables
from ssa_megatron.files import replace_durably
from ssa_megatron.report import figures
from ssa_megatron.report.heatmap import heat_map
from ssa_megatron.report.report_sections import html_table, section
from ssa_megatron.report.svg import Axis, Layer, chart, log_axis

STYLES = (Path(figures.__file__).with_name("page.css"), Path(__file__).with_name("page.css"))
COLOURS = 6
WIDE, NARROW, SMALL = (940, 330), (400, 290), (400, 250)
INTRODUCTIONS = {
    "budget": "What sparse attention costs over the same model's full attention, the zero line. Below it, sparse is better.",
    "length": "Perplexity at each place of long sequences. Beyond the dotted line lie places that no training sequence had.",
    "needle": "A fact is hidden at a depth of a long text and asked for at its end. Full colour: every needle found.",
    "attention": (
        "Mass inside: the share of full attention that falls on the blocks sparse attention would read. "
        "Entropy: how widely a head spreads its attention. Theorem 1 bounds the error by the mass that is dropped."
    ),
    "tasks": "lm-eval's tasks, through its own Hugging Face backend.",
}


class Picture(NamedTuple):
    title: str
    svg: str
    legend: list[tuple[str, str]]
    """(mark and role, text)"""
    narrow: str = ""
    """The same for a telephone, where a picture as wide as the page would be too small to read."""


def write_page(out: Path, found: Sequence[dict]) -> Path:
    """Write `out/report.html` and `out/*.svg`; each replaces an earlier one in one rename. Returns the page's path."""
    style, drawn, text = compose(found)
    for path in out.glob("*.svg"):
        if re.fullmatch(
            rf"({'|'.join(PICTURES)})(-\d+)?\.svg", path.name
        ):  # of an earlier evaluation, which may have had more
            path.unlink()
    for part, pictures in drawn.items():
        for number, one in enumerate(pictures):
            name = f"{part}-{number}.svg" if len(pictures) > 1 else f"{part}.svg"
            replace_durably(out / name, standalone(one.title, one.svg, one.legend, style))
    replace_durably(out / "report.html", text)
    return out / "report.html"


def compose(found: Sequence[dict]) -> tuple[str, dict[str, list[Picture]], str]:
    """Style sheet, pictures by part, and the page. Where results lack something, or hold another type: what Python raises."""
    style = "\n".join(path.read_text(encoding="utf-8") for path in STYLES)
    drawn = {part: list(draw(found)) for part, draw in PICTURES.items()}
    every = tables(found, detail=True)
    sections = [
        _section(part, [table for table in every if table.part == part], drawn.get(part, []))
        for part in dict.fromkeys(table.part for table in every)
    ]
    title = "Evaluation of " + ", ".join(model["name"] for model in found)
    warnings = "".join(f'<p class="warn">{escape(line)}</p>' for line in differences(found))
    page = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{_lead(found)}{warnings}</header>\n"
        + "\n".join(sections)
        + f"\n{_settings(found)}"
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')}; results.json beside this page holds every number.</footer>\n"
        "</body>\n</html>\n"
    )
    return style, drawn, page


def standalone(title: str, svg: str, legend: Sequence[tuple[str, str]], style: str) -> str:
    """A picture as a file of its own: title, drawing, legend and style, on paper that follows the reader's colour scheme."""
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    marks, x, y = [], 12, height + 44
    for kind, text in legend:
        room = 44 + 7 * len(text)
        if x > 12 and x + room > width:
            x, y = 12, y + 18
        marks.append(f'<g transform="translate({x} {y - 10})">{figures.mark(kind)}</g>')
        marks.append(f'<text x="{x + 24}" y="{y}">{escape(text)}</text>')
        x += room
    tall = y + 12 if legend else height + 34
    return (
        f'<svg viewBox="0 0 {width} {tall}" width="{width}" height="{tall}" xmlns="http://www.w3.org/2000/svg">'
        f'<style>{escape(style)}</style><rect width="{width}" height="{tall}" style="fill: var(--paper)"/>'
        f'<text x="12" y="18" style="fill: var(--ink)">{escape(title)}</text>'
        f'<g transform="translate(0 26)">{re.sub("^<svg ", f"""<svg width="{width}" height="{height}" """, svg)}</g>'
        f"{''.join(marks)}</svg>\n"
    )


# ------------------------------------------------------------------------------------------------------------ pictures
def _wide(title: str, layers: Sequence[Layer], legend: list[tuple[str, str]], **how) -> Picture:
    """A chart as wide as the page; `how` as for `chart`."""
    sizes = (WIDE, NARROW)
    svg, narrow = (chart(layers, width=width, height=height, **how) for width, height in sizes)
    return Picture(title, svg, legend, narrow)


def _budget(found: Sequence[dict]) -> Iterator[Picture]:
    """Nats over full mode, against blocks; and again without the smallest budgets, where they dwarf the others."""
    curves, own = {}, set()
    for role, model in _having(found, "budget"):
        rows = [row for row in model["budget"]["rows"] if row["mode"] == "sparse"]
        curves[role, model["name"]] = sorted((row["block_count"], row["gap"]) for row in rows)
        own.add(model["block_count"])
    every = sorted({x for points in curves.values() for x, _ in points})
    tail = [count for count in every if own and 2 * count >= min(own)]
    reach = {
        first: max((abs(y) for points in curves.values() for x, y in points if x >= first), default=0.0)
        for first in (*every[:1], *tail[:1])
    }
    close = len(tail) > 2 and reach[every[0]] > 4 * reach[tail[0]] > 0
    for counts, title in (
        (every, "Sparse against full, by budget"),
        (tail, "The same, close to the model's own budget"),
    ):
        if not any(curves.values()) or (counts is tail and not close):
            continue
        layers = []
        for (role, name), points in curves.items():
            shown = [point for point in points if point[0] >= counts[0]]
            layers += [Layer(shown, "line", role), Layer(shown, "dot", role, name)]
        inside = [count for count in sorted(own) if counts[0] <= count <= counts[-1]]
        legend = [(f"line {role}", name) for role, name in curves]
        legend += [("vertical", f"the model's own, {count} blocks") for count in inside]
        yield _wide(
            title, layers, legend, label="Nats over full attention, by blocks a token", x_label="blocks a token",
            y_label="nats per token over full", rules=[0.0], x_axis=_doubling(set(counts)), verticals=inside,
        )  # fmt: skip


def _length(found: Sequence[dict]) -> Iterator[Picture]:
    """Perplexity against position; full mode drawn through, sparse mode at the model's own budget dashed."""
    layers, legend, ends, trained, own = [], [], set(), set(), {}
    for role, model in _having(found, "length"):
        part = model["length"]
        trained.add(part["trained_length"])
        ends |= set(part["edges"][1:])
        legend.append((f"line {role}", model["name"]))
        for row in part["rows"]:
            if row["mode"] == "full" or row["block_count"] == model["block_count"]:
                dashed = "" if row["mode"] == "full" else " dashed"
                points = [(end, math.exp(n)) for end, n in zip(part["edges"][1:], row["nats"], strict=True)]
                says = f"{model['name']}, {setting(row)}"
                layers += [Layer(points, "line", role + dashed), Layer(points, "dot", role, says)]
                own.setdefault(dashed, set()).add(setting(row))
    legend += [(f"line plain{dashed}", " or ".join(sorted(said))) for dashed, said in own.items()]
    inside = [at for at in sorted(trained) if min(ends, default=0) <= at <= max(ends, default=0)]
    legend += [("vertical", f"trained on {at:,} tokens") for at in inside]
    if layers:
        yield _wide(
            "Perplexity by position", layers, legend, label="Perplexity by position", x_label="tokens, end of the bucket",
            y_label="perplexity", x_axis=_doubling(ends), log_above=8, verticals=inside,
        )  # fmt: skip


def _needle(found: Sequence[dict]) -> Iterator[Picture]:
    for role, model in _having(found, "needle"):
        part = model["needle"]
        for mode in ("full", "sparse"):
            shares = {(c["depth"], c["context"]): c["ranked"] for c in part["cells"] if c["mode"] == mode}
            name = "full" if mode == "full" else f"sparse k={part['block_count']}"
            title = f"{model['name']}, {name}: ranked first"
            yield Picture(
                title,
                heat_map(
                    [[shares.get((depth, context)) for context in part["contexts"]] for depth in part["depths"]],
                    x=[f"{context:,}" for context in part["contexts"]], y=[f"{depth:.2f}" for depth in part["depths"]],
                    x_label="context, tokens", y_label="depth", label=title, role=role, low=part["chance"], high=1.0,
                ),
                [],
            )  # fmt: skip


def _attention(found: Sequence[dict]) -> Iterator[Picture]:
    yield from _theorem(found)
    yield from _overlap(found)
    entropies = [
        x
        for _, model in _having(found, "attention")
        for layer in model["attention"]["layers"]
        for x in layer["entropy"]
    ]
    # one scale for all models, or equal colours would not be equal values
    shown = {
        "sparsity": ("mass inside", 0.0, 1.0),
        "entropy": ("entropy, nats", min(entropies, default=0), max(entropies, default=1)),
    }
    for role, model in _having(found, "attention"):
        layers = model["attention"]["layers"]
        for key, (title, low, high) in shown.items():
            values = [layer[key] for layer in layers]
            yield Picture(
                f"{model['name']}: {title}",
                heat_map(
                    values, x=[str(i) for i in range(len(values[0]))], y=[str(i) for i in range(len(values))],
                    x_label="head", y_label="layer", label=title, role=role, low=low, high=high,
                ),
                [],
            )  # fmt: skip


def _theorem(found: Sequence[dict]) -> Iterator[Picture]:
    layers, legend, reach = [], [], []
    for role, model in _having(found, "attention"):
        bins = model["attention"]["bins"]
        reach += [one["dropped"] for one in bins]
        for key, dashed in (("error", ""), ("bound", " dashed")):
            points = [(one["dropped"], one[key]) for one in bins]
            layers += [Layer(points, "line", role + dashed), Layer(points, "dot", role, f"{model['name']}, {key}")]
        legend.append((f"line {role}", model["name"]))
    legend += [("line plain", "error"), ("line plain dashed", "bound")]
    if reach and max(reach) > min(reach):
        yield Picture(
            "Theorem 1: output error and its bound, by dropped mass",
            chart(
                layers, width=SMALL[0], height=SMALL[1], label="Output error and bound by dropped mass", x_label="dropped mass",
                y_label="norm", log_above=8, x_axis=log_axis(min(reach), max(reach)),
            ),
            legend,
        )  # fmt: skip


def _overlap(found: Sequence[dict]) -> Iterator[Picture]:
    layers, legend, lags = [], [], set()
    for role, model in _having(found, "attention"):
        part = model["attention"]
        points = []
        for i, lag in enumerate(part["lags"]):
            shares = [layer["overlap"][i] for layer in part["layers"] if layer["overlap"][i] is not None]
            if shares:
                points.append((lag, math.fsum(shares) / len(shares)))
        lags |= {lag for lag, _ in points}
        layers += [Layer(points, "line", role), Layer(points, "dot", role, model["name"])]
        legend.append((f"line {role}", model["name"]))
    if len(lags) > 1:
        yield Picture(
            "Blocks shared with an earlier token",
            chart(
                layers, width=SMALL[0], height=SMALL[1], label="Share of blocks that an earlier token selected too",
                x_label="tokens earlier", y_label="share", zero=True, x_axis=_doubling(lags),
            ),
            legend,
        )  # fmt: skip


PICTURES = {"budget": _budget, "length": _length, "needle": _needle, "attention": _attention}


def _having(found: Sequence[dict], part: str) -> Iterator[tuple[str, dict]]:
    """(CSS class of its colour, model) of the models that have a part."""
    return ((f"m{i % COLOURS}", model) for i, model in enumerate(found) if part in model)


def _doubling(values: set[int]) -> Axis:
    """A logarithmic axis with a tick at every value."""
    ends = (min(values), max(values)) if len(values) > 1 else (min(values) / 2, min(values) * 2)
    return Axis(*ends, tuple((value, f"{value:,}") for value in sorted(values)), log=True)


# ------------------------------------------------------------------------------------------------------------ the page
def _lead(found: Sequence[dict]) -> str:
    count = "One model" if len(found) == 1 else f"{len(found)} models"
    texts = " and ".join(dict.fromkeys(model["text"]["name"] for model in found))
    said = f"{count}, in full attention and in sparse attention at several budgets, on text of {texts}."
    return f'<p class="lead">{escape(said)}</p>'


def _section(part: str, every: Sequence[Table], pictures: Sequence[Picture]) -> str:
    """Introduction, wide pictures, the first table, small pictures, the other tables."""
    parts = [f'<p class="note">{escape(INTRODUCTIONS[part])}</p>'] if part in INTRODUCTIONS else []
    parts += [figures.framed(p.title, {"wide": p.svg, "narrow": p.narrow}, p.legend) for p in pictures if p.narrow]
    parts += [html_table(table.heads, table.rows) + _note(table) for table in every[:1]]
    small = [figures.framed(p.title, {"": p.svg}, p.legend) for p in pictures if not p.narrow]
    if small:
        parts.append(f'<div class="panels">{"".join(small)}</div>')
    for table in every[1:]:
        parts.append(f"<h3>{escape(table.title)}</h3>" + html_table(table.heads, table.rows) + _note(table))
    return section(every[0].title, "".join(parts))


def _note(table: Table) -> str:
    return f'<p class="note">{escape(table.note)}</p>' if table.note else ""


def _settings(found: Sequence[dict]) -> str:
    keys = dict.fromkeys(itertools.chain(*(model["settings"] for model in found)))
    rows = [(key, *(str(model["settings"].get(key)) for model in found)) for key in keys]
    for key in (
        "target",
        "text",
        "device",
        "weights_sha256",
        "tokenizer_fingerprint",
        "recipe_digest",
        "versions",
        "seconds",
    ):
        rows.append((key, *(str(model[key]["sha256"] if key == "text" else model[key]) for model in found)))
    table = html_table(("Setting", *(model["name"] for model in found)), rows)
    return f"<details><summary>Settings and digests</summary>{table}</details>\n"
