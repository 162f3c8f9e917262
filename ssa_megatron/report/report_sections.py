"""The sections of a report below its curves: perplexity, samples, resume, notes, checkpoints.

Each takes what the caller gave, shows all of it escaped, and is "" where nothing was given. Values of an unexpected type are
named in the page, not raised: a report is the last thing a run writes and must not fail it.
"""

import time
from collections.abc import Callable
from html import escape

from ssa_megatron.report.figures import short
from ssa_megatron.report.svg import is_finite


def perplexity(extra: dict) -> str:
    """Table of held-out nats per token and perplexity, by mode and block count, with the difference to full mode."""

    def table(rows: list[dict]) -> str:
        full = next((_number(row.get("nats")) for row in rows if row.get("mode") == "full"), None)
        cells = []
        for row in rows:
            nats = _number(row.get("nats"))
            gap = f"{nats - full:+.4f}" if nats is not None and full is not None and row.get("mode") != "full" else ""
            blocks = "all" if row.get("mode") == "full" else row.get("block_count")
            cells.append(
                (row.get("mode"), blocks, _decimals(nats, 4), _decimals(_number(row.get("perplexity")), 2), gap)
            )
        heads = ("Mode", "*Blocks", "*Nats per token", "*Perplexity", "*Against full")
        return html_table(heads, cells)

    return _list_section("Perplexity of the exported model", extra, "perplexity", dict, table)


def samples(extra: dict) -> str:
    """Prompts and their continuations."""

    def quote(row: dict) -> str:
        speed = _number(row.get("tokens_per_second"))
        pace = f", {short(speed)} tokens/s" if speed is not None else ""
        return (
            f'<blockquote class="sample"><p><span class="prompt">{_text(row.get("prompt", ""))}</span>'
            f"{_text(row.get('text'))}</p><footer>{_text(row.get('mode'))} attention{escape(pace)}</footer></blockquote>"
        )

    return _list_section(
        "Samples", extra, "samples", dict, lambda rows: f'<div class="samples">{"".join(map(quote, rows))}</div>'
    )


def resume(extra: dict) -> str:
    """What a killed and resumed run was compared with, and what came out."""
    found = extra.get("resume")
    if found is None:
        return ""
    if not isinstance(found, dict):
        return section("Killed and resumed", _unexpected("resume", found))
    compared = found.get("steps_compared")
    facts = {
        "Killed": f"at step {_text(found.get('killed_at_step'))}",
        "Resumed": f"from step {_text(found.get('resumed_from_step'))}",
        "Losses": f"{_verdict(found.get('losses_equal'))}, {_text(compared)} steps compared with an uninterrupted run",
        "Weights": f"{_verdict(found.get('weights_equal'))}, compared with an uninterrupted run",
        "sha256 of the weights": f"<code>{_text(found.get('sha256'))}</code>",
    }
    rows = "".join(f"<dt>{key}</dt><dd>{value}</dd>" for key, value in facts.items())
    return section("Killed and resumed", f'<dl class="facts">{rows}</dl>')


def notes(extra: dict) -> str:
    """Sentences of the caller, one a line."""
    return _list_section(
        "Notes", extra, "notes", str,
        lambda rows: f'<ul class="notes">{"".join(f"<li>{escape(row)}</li>" for row in rows)}</ul>',
    )  # fmt: skip


def checkpoints(found: list[dict], *, keep: int) -> str:
    """Table of committed checkpoints, newest first; sizes are compared with the manifest, digests are not."""
    if not found:
        return section("Checkpoints", '<p class="absent">No checkpoint is committed in this run folder.</p>')
    cells = []
    for row in found:
        stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["time"])) if "time" in row else None
        state = row.get("problem") or ("complete, latest" if row["latest"] else "complete")
        tokens = _number(row.get("tokens"))
        count = f"{tokens:,.0f}" if tokens is not None else None
        cells.append((row["name"], count, row.get("files"), _size(row.get("bytes")), stamp, state))
    heads = ("Folder", "*Tokens", "*Files", "*Size", "Committed", "State")
    note = f"The newest {keep} are kept. Complete: every file has the size its manifest says; digests are checked on loading."
    return section("Checkpoints", f'{html_table(heads, cells)}<p class="note">{note}</p>')


def _list_section(title: str, extra: dict, key: str, kind: type, show: Callable[[list], str]) -> str:
    """The section of a list in `extra`; entries that are not of `kind` are counted in the page."""
    found = extra.get(key)
    if found is None:
        return ""
    if not isinstance(found, list):
        return section(title, _unexpected(key, found))
    good = [entry for entry in found if isinstance(entry, kind)]
    odd = [entry for entry in found if not isinstance(entry, kind)]
    body = (show(good) if good else "") + "".join(_unexpected(key, entry) for entry in odd)
    return section(title, body or f'<p class="absent">{escape(key)} is an empty list.</p>')


def section(title: str, body: str) -> str:
    """HTML under a heading."""
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def html_table(heads: tuple[str, ...], rows: list[tuple]) -> str:
    """A column whose head begins with `*` holds numbers."""
    kinds = [' class="number"' if head.startswith("*") else "" for head in heads]
    head = "".join(f"<th{kind}>{escape(name.lstrip('*'))}</th>" for kind, name in zip(kinds, heads, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{_text(cell)}</td>' for kind, cell in zip(kinds, row, strict=True))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _unexpected(key: str, value: object) -> str:
    return f'<p class="warn">{escape(key)} holds an entry of type {type(value).__name__}, which has no place here.</p>'


def _verdict(value: object) -> str:
    if value is True:
        return '<span class="good">equal</span>'
    return '<span class="warn">not equal</span>' if value is False else "not compared"


def _text(value: object) -> str:
    return "—" if value is None else escape(str(value))


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _decimals(value: float | None, places: int) -> str | None:
    if value is None:
        return None
    return f"{value:,.{places}f}" if is_finite(value) else "not finite"


def _size(count: int | None) -> str | None:
    if count is None:
        return None
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"
