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

from ssa_megatron.evaluation.tables import Table, differences, setting, tables
from ssa_megatron.files import replace_durably
from ssa_megatron.report import figures
from ssa_megatron.report.heatmap import heat_map
from ssa_megatron.report.sections import html_table, section
from ssa_megatron.report.svg import Axis, Layer, chart, log_axis

STYLES = (Path(figures.__file__).with_name("page.css"), Path(__file__).with_name("page.css"))
COLOURS = 6
WIDE, SMALL = (940, 330), (400, 250)


def write_page(out: Path, found: Sequence[dict]) -> Path:
    """Write `out/report.html` and `out/*.svg`; each replaces an earlier one in one rename. Returns the page's path."""
    style = "\n".join(path.read_text(encoding="utf-8") for path in STYLES)
    drawn = {part: list(draw(found)) for part, draw in PICTURES.items()}
    for path in out.glob("*.svg"):
        if re.fullmatch(
            rf"({'|'.join(PICTURES)})(-\d+)?\.svg", path.name
        ):  # of an earlier evaluation, which may have had more
            path.unlink()
    for part, pictures in drawn.items():
        for number, picture in enumerate(pictures):
            name = f"{part}-{number}.svg" if len(pictures) > 1 else f"{part}.svg"
            replace_durably(out / name, standalone(*picture, style))
    every = tables(found, detail=True)
    sections = [
        _section(part, [table for table in every if table.part == part], drawn.get(part, []))
        for part in dict.fromkeys(table.part for table in every)
    ]
    title = "Evaluation of " + ", ".join(model["name"] for model in found)
    warnings = "".join(f'<p class="warn">{escape(line)}</p>' for line in differences(found))
    text = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>{warnings}</header>\n" + "\n".join(sections) + f"\n{_settings(found)}"
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')}; results.json beside this page holds every number.</footer>\n"
        "</body>\n</html>\n"
    )
    replace_durably(out / "report.html", text)
    return out / "report.html"


def standalone(title: str, svg: str, legend: Sequence[tuple[str, str]], style: str) -> str:
    """A picture as a file of its own: title, drawing, legend and style, on paper that follows the reader's colour scheme."""
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    marks, x, y = [], 12, height + 44
    for kind, text in legend:
        room = 34 + 6 * len(text)
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
Picture = tuple[str, str, list[tuple[str, str]]]
"""Title, SVG, legend."""


def _budget(found: Sequence[dict]) -> Iterator[Picture]:
    """Nats over full mode, against blocks."""
    layers, legend, counts = [], [], set()
    for role, model in _having(found, "budget"):
        points = [(row["block_count"], row["gap"]) for row in model["budget"]["rows"] if row["mode"] == "sparse"]
        points.sort()
        counts |= {x for x, _ in points}
        layers += [Layer(points, "line", role), Layer(points, "dot", role, model["name"])]
        legend.append((f"line {role}", model["name"]))
    if layers:
        yield (
            "Sparse against full, by budget",
            chart(
                layers, width=WIDE[0], height=WIDE[1], label="Nats over full attention, by blocks a token",
                x_label="blocks a token", y_label="nats per token over full", rules=[0.0], x_axis=_doubling(counts),
            ),
            legend,
        )  # fmt: skip


def _length(found: Sequence[dict]) -> Iterator[Picture]:
    """Perplexity against position; full mode drawn through, sparse mode at the model's own budget dashed."""
    layers, legend, ends, trained = [], [], set(), set()
    for role, model in _having(found, "length"):
        part = model["length"]
        trained.add(part["trained_length"])
        ends |= set(part["edges"][1:])
        for row in part["rows"]:
            if row["mode"] == "full" or row["block_count"] == model["block_count"]:
                dashed = "" if row["mode"] == "full" else " dashed"
                points = [(end, math.exp(n)) for end, n in zip(part["edges"][1:], row["nats"], strict=True)]
                layers += [Layer(points, "line", role + dashed), Layer(points, "dot", role, model["name"])]
                legend.append((f"line {role}{dashed}", f"{model['name']}, {setting(row)}"))
    inside = [at for at in sorted(trained) if min(ends, default=0) <= at <= max(ends, default=0)]
    legend += [("vertical", f"trained on {at:,} tokens") for at in inside]
    if layers:
        yield (
            "Perplexity by position",
            chart(
                layers, width=WIDE[0], height=WIDE[1], label="Perplexity by position", x_label="tokens, end of the bucket",
                y_label="perplexity", x_axis=_doubling(ends), log_above=8,
                verticals=inside,
            ),
            legend,
        )  # fmt: skip


def _needle(found: Sequence[dict]) -> Iterator[Picture]:
    for role, model in _having(found, "needle"):
        part = model["needle"]
        for mode in ("full", "sparse"):
            shares = {(c["depth"], c["context"]): c["ranked"] for c in part["cells"] if c["mode"] == mode}
            name = "full" if mode == "full" else f"sparse k={part['block_count']}"
            title = f"{model['name']}, {name}: ranked first"
            yield (
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
    for role, model in _having(found, "attention"):
        layers = model["attention"]["layers"]
        for key, title, high in (("sparsity", "mass inside", 1.0), ("entropy", "entropy, nats", None)):
            values = [layer[key] for layer in layers]
            ends = (min(map(min, values)), max(map(max, values))) if high is None else (0.0, high)
            yield (
                f"{model['name']}: {title}",
                heat_map(
                    values, x=[str(i) for i in range(len(values[0]))], y=[str(i) for i in range(len(values))],
                    x_label="head", y_label="layer", label=title, role=role, low=ends[0], high=ends[1],
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
            legend.append((f"line {role}{dashed}", f"{model['name']}, {key}"))
    if reach and max(reach) > min(reach):
        yield (
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
        yield (
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
def _section(part: str, every: Sequence[Table], pictures: Sequence[Picture]) -> str:
    parts = []
    for table in every[:1]:
        parts.append(html_table(table.heads, table.rows) + _note(table))
    wide = [p for p in pictures if f'viewBox="0 0 {WIDE[0]} ' in p[1]]
    parts += [figures.framed(title, {"": svg}, legend) for title, svg, legend in wide]
    small = [
        figures.framed(title, {"": svg}, legend) for title, svg, legend in pictures if (title, svg, legend) not in wide
    ]
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
