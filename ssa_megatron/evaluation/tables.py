"""The tables of an evaluation, models side by side, from what results.json holds; for the console and for the page.

Every number is one of results.json, or a mean of several, and is named so. A part that no model has gives no table; one
that some lack gives dashes there.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

PLAIN = "—"


class Table(NamedTuple):
    part: str
    title: str
    heads: tuple[str, ...]
    """A column whose head begins with `*` holds numbers."""
    rows: list[tuple]
    note: str = ""


def tables(found: Sequence[dict], *, detail: bool = False) -> list[Table]:
    """All of them; `detail` adds those with a row a layer when there are several models."""
    made = [*_glance(found), _models(found)]
    for part, make in (("budget", _budget), ("length", _length), ("needle", _needle), ("attention", _attention)):
        having = [model for model in found if part in model]
        if having:
            made += make(having)
    for model in found if detail or len(found) == 1 else ():
        if "attention" in model:
            made.append(_layers(model, alone=len(found) == 1))
    if any("tasks" in model for model in found):
        made.append(_tasks([model for model in found if "tasks" in model]))
    return made


def differences(found: Sequence[dict]) -> list[str]:
    """What keeps the models from being comparable, one sentence each."""
    first, said = found[0], []
    for model in found[1:]:
        pair = f"{first['name']} and {model['name']}"
        if model["text"]["sha256"] != first["text"]["sha256"]:
            said.append(f"{pair} were measured on different texts ({first['text']['name']}, {model['text']['name']}).")
        changed = [
            key for key, value in first["settings"].items() if key != "parts" and model["settings"].get(key) != value
        ]
        if changed:
            said.append(f"{pair} were measured with different settings: {', '.join(changed)}.")
        if model["trained_length"] != first["trained_length"]:
            said.append(f"{pair} were trained on different lengths, to which budgets and attention are cut.")
        if model["tokenizer_fingerprint"] != first["tokenizer_fingerprint"]:
            said.append(f"{pair} have different tokenizers: compare bits per byte, not nats per token.")
    return said


def render(table: Table) -> str:
    """Plain text, columns aligned."""
    cells = [[head.lstrip("*") for head in table.heads], *([text(cell) for cell in row] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [head.startswith("*") for head in table.heads]
    lines = [
        "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in cells
    ]
    return "\n".join((table.title, *(f"  {line}" for line in lines), *([f"  {table.note}"] if table.note else [])))


def text(cell: object) -> str:
    return PLAIN if cell is None else str(cell)


def setting(row: dict, everything: int | None = None) -> str:
    """A row's attention in words: "full", "sparse k=8", "sparse k=all"."""
    if row["mode"] == "full":
        return "full"
    return f"sparse k={'all' if row['block_count'] == everything else row['block_count']}"


def _glance(found: Sequence[dict]) -> list[Table]:
    """One row a model: what is asked first. Sparse attention is at the model's own number of blocks."""
    last = next((tuple(model["length"]["edges"][-2:]) for model in found if "length" in model), (0, 0))

    def far(model: dict) -> str | None:
        if tuple(model["length"]["edges"][-2:]) != last:
            return None  # measured at other places
        return _pair(_own(model, "length"), lambda row: f"{math.exp(row['nats'][-1]):.2f}")

    columns: list[tuple[str, str, Callable[[dict], str | None]]] = [
        ("*perplexity", "budget", lambda m: _pair(_own(m, "budget"), lambda row: f"{row['perplexity']:.2f}")),
        ("*sparse over full, nats", "budget", lambda m: _gap(_own(m, "budget")[1] or {"mode": "full"})),
        (f"*perplexity, {last[0]:,}-{last[1]:,}", "length", far),
        ("*needles found", "needle", lambda m: _pair(_needles(m), lambda cells: f"{_mean(cells, 'ranked'):.2f}")),
        ("*mass inside", "attention", lambda m: f"{_middle([_layer(x)[0] for x in m['attention']['layers']]):.2f}"),
    ]
    columns = [column for column in columns if any(column[1] in model for model in found)]
    rows = [(model["name"], *(make(model) if part in model else None for _, part, make in columns)) for model in found]
    note = "full / sparse attention, the latter with each model's own number of blocks"
    return [Table("glance", "At a glance", ("Model", *(head for head, _, _ in columns)), rows, note)] if columns else []


def _own(model: dict, part: str) -> tuple[dict | None, dict | None]:
    """Rows of a part: full attention, and sparse attention at the model's own number of blocks."""
    rows = model[part]["rows"]
    full = next((row for row in rows if row["mode"] == "full"), None)
    sparse = (row for row in rows if row["mode"] == "sparse" and row["block_count"] == model["block_count"])
    return full, next(sparse, None)


def _needles(model: dict) -> tuple[list[dict], list[dict]]:
    cells = model["needle"]["cells"]
    return tuple([cell for cell in cells if cell["mode"] == mode] for mode in ("full", "sparse"))


def _pair(both: tuple, show: Callable) -> str:
    """ "full / sparse", a dash for the one that was not measured."""
    return " / ".join(show(one) if one else PLAIN for one in both)


def _models(found: Sequence[dict]) -> Table:
    heads = ("Model", "Attention", "*Parameters", "*Step", "*Trained length", "*Blocks", "RoPE", "Weights")
    rows = [
        (
            model["name"],
            model["kind"],
            None if model["parameters"] is None else f"{model['parameters']:,}",
            None if model["step"] is None else f"{model['step']:,}",
            f"{model['trained_length']:,}",
            f"{model['block_count']} of {model['block_size']}",
            rope(model),
            f"{(model['weights_sha256'] or PLAIN)[:12]} {model['dtype']}",
        )
        for model in found
    ]
    body = found[0]["text"]
    return Table("models", "Models", heads, rows, f"Text: {body['name']}, sha256 {body['sha256'][:12]}")


def rope(model: dict) -> str:
    """How positions are scaled, in words."""
    found = model["rope"]
    return "as trained" if model["settings"]["rope_factor"] is None else f"{found['rope_type']} x {found['factor']:g}"


def _budget(found: Sequence[dict]) -> list[Table]:
    """One table; from three models on two, as one with both columns of each would be wider than a page."""
    columns = [{setting(row, model["budget"]["all"]): row for row in model["budget"]["rows"]} for model in found]
    names, models = dict.fromkeys(itertools.chain(*columns)), [model["name"] for model in found]

    def table(title: str, heads: Sequence[str], cells: Callable[[dict], list], width: int) -> Table:
        rows = [
            (
                name,
                *(cell for column in columns for cell in (cells(column[name]) if name in column else [None] * width)),
            )
            for name in names
        ]
        return Table("budget", title, ("Attention", *heads), rows, note)

    budget = found[0]["budget"]
    note = (
        f"{budget['tokens']:,} tokens in {budget['pieces']:,} pieces of at most {budget['length']:,}; "
        "nats per token, paired standard errors"
    )
    title, over = "Quality against budget", "Over the model's own full attention"
    if len(found) == 1:
        heads = ("*nats/token", "*over full", "*perplexity", "*bits/byte")
        return [
            table(
                title,
                heads,
                lambda row: [_nats(row), _gap(row), f"{row['perplexity']:.2f}", f"{row['bits_per_byte']:.4f}"],
                4,
            )
        ]
    if len(found) == 2:
        heads = [head for name in models for head in (f"*{name}", "*over full")]
        return [table(title, heads, lambda row: [_nats(row), _gap(row)], 2)]
    heads = [f"*{name}" for name in models]
    return [table(title, heads, lambda row: [_nats(row)], 1), table(over, heads, lambda row: [_gap(row)], 1)]


def _nats(row: dict) -> str:
    return f"{row['nats']:.4f}"


def _gap(row: dict) -> str | None:
    if row["mode"] == "full":
        return None
    return f"{round(row['gap'], 4) + 0.0:+.4f}" + ("" if row["gap_error"] is None else f" ± {row['gap_error']:.4f}")


def _length(found: Sequence[dict]) -> list[Table]:
    edges = found[0]["length"]["edges"]
    buckets = [f"*{a:,}-{b:,}" for a, b in itertools.pairwise(edges)]
    rows = []
    for model in found:
        part = model["length"]
        for row in part["rows"]:
            cells = dict(zip(itertools.pairwise(part["edges"]), row["nats"], strict=True))
            shown = [cells.get(bucket) for bucket in itertools.pairwise(edges)]
            rows.append((model["name"], setting(row), *(None if n is None else f"{math.exp(n):.2f}" for n in shown)))
    note = (
        f"trained on {found[0]['length']['trained_length']:,} tokens; {found[0]['length']['sequences']} sequences of "
        f"{edges[-1]:,}; RoPE {', '.join(dict.fromkeys(map(rope, found)))}"
    )
    return [Table("length", "Perplexity by position", ("Model", "Attention", *buckets), rows, note)]


def _needle(found: Sequence[dict]) -> list[Table]:
    contexts = found[0]["needle"]["contexts"]
    rows = []
    for model in found:
        part = model["needle"]
        for mode in ("full", "sparse"):
            cells = [cell for cell in part["cells"] if cell["mode"] == mode]
            name = "full" if mode == "full" else f"sparse k={part['block_count']}"
            here = [[cell for cell in cells if cell["context"] == context] for context in contexts]
            shares = [f"{_mean(c, 'ranked'):.2f} / {_mean(c, 'greedy'):.2f}" if c else None for c in here]
            rows.append((model["name"], name, *shares, f"{_mean(cells, 'margin'):+.3f}"))
    part = found[0]["needle"]
    note = (
        f"ranked first / written greedily, means over {len(part['depths'])} depths of {part['cells'][0]['samples']} needles; "
        f"chance {part['chance']:.3f} / 0"
    )
    heads = ("Model", "Attention", *(f"*{context:,}" for context in contexts), "*margin, nats")
    return [Table("needle", "Needle in a haystack", heads, rows, note)]


def _mean(cells: Sequence[dict], key: str) -> float:
    return math.fsum(cell[key] for cell in cells) / len(cells)


ATTENTION_HEADS = (
    "*mass inside",
    "*entropy",
    "*dropped",
    "*error",
    "*bound",
    "*error/bound",
    "*violations",
    "*overlap",
)


def _attention(found: Sequence[dict]) -> list[Table]:
    rows = []
    for model in found:
        layers = [_layer(layer) for layer in model["attention"]["layers"]]
        means = [
            (sum if i == 6 else _middle)([layer[i] for layer in layers if layer[i] is not None])
            for i in range(len(ATTENTION_HEADS))
        ]
        rows.append((model["name"], *_shown(means)))
    note = _attention_note(found[0])
    return [Table("attention", "Attention, means over layers", ("Model", *ATTENTION_HEADS), rows, note)]


def _layers(model: dict, *, alone: bool) -> Table:
    rows = [(i, *_shown(_layer(layer))) for i, layer in enumerate(model["attention"]["layers"])]
    title = "Attention by layer" if alone else f"Attention by layer, {model['name']}"
    return Table("attention", title, ("*Layer", *ATTENTION_HEADS), rows, _attention_note(model))


def _layer(layer: dict) -> list[float | None]:
    theorem = layer["theorem"] or {}
    middle = [theorem.get(key) for key in ("dropped", "error", "bound", "tightness", "violations")]
    return [_middle(layer["sparsity"]), _middle(layer["entropy"]), *middle, layer["overlap"][0]]


def _middle(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _shown(values: Sequence[float | None]) -> list[str | None]:
    return [None if value is None else str(value) if isinstance(value, int) else f"{value:.4f}" for value in values]


def _attention_note(model: dict) -> str:
    part = model["attention"]
    chance = f", {part['chance']:.2f} by chance" if part["chance"] is not None else ""
    return (
        f"{part['sequences']} sequences of {part['length']:,} tokens; mass inside {part['block_count']} blocks of "
        f"{part['block_size']}; Theorem 1 on tokens that drop blocks; overlap with the token before{chance}"
    )


def _tasks(found: Sequence[dict]) -> Table:
    rows = []
    for model in found:
        for row in model["tasks"]["rows"]:
            metrics = [key for key in row if f"{key}_stderr" in row]
            shown = [f"{key} {row[key]:.4f} ± {row[f'{key}_stderr']:.4f}" for key in metrics]
            rows.append((row["task"], model["name"], row["mode"], row["documents"], ", ".join(shown)))
    rows.sort(key=lambda row: row[0])
    part = found[0]["tasks"]
    note = f"{part['library']}, {part['few_shot']} examples before each question"
    return Table("tasks", "Tasks", ("Task", "Model", "Attention", "*Documents", "Metrics"), rows, note)
