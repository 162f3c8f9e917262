"""report.html of a run folder: one page that needs no network and no JavaScript, for the screen, a phone and paper.

It says only what the run folder and the caller's `extra` hold, and where something is missing it says that instead. It
refuses a folder that is not a run; everything else that is absent, short, damaged or non-finite still gives a page.
"""

import json
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

from ssa_megatron.checkpoint.manifest import LATEST, MANIFEST, Manifest, committed
from ssa_megatron.config import Recipe, dump_recipe
from ssa_megatron.errors import CheckpointError
from ssa_megatron.files import replace_durably
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.model.shapes import parameter_count
from ssa_megatron.report import report_sections as sections
from ssa_megatron.report.figures import figures, last_finite, series, short
from ssa_megatron.report.svg import is_finite
from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.run_folder import read_recipe


@dataclass(frozen=True)
class _Run:
    recipe: Recipe
    lines: list[dict]
    environment: dict
    extra: dict
    problems: list[str]
    """What could not be read; said at the top of the page."""


def write_report(run: Path, *, extra: dict | None = None) -> Path:
    """Write `run/report.html` and return its path; an earlier report is replaced in one rename.

    `extra` is merged over `run/report-extra.json`, key by key: `unigram_entropy` (nats per token), `samples`,
    `perplexity`, `resume`, `notes`. Raises RunFolderError when `run` is not a run folder.
    """
    run = Path(run)
    text = _page(_read(run, extra or {}), run)
    path = run / "report.html"
    replace_durably(path, text)
    return path


def _read(run: Path, extra: dict) -> _Run:
    recipe = read_recipe(run)
    problems: list[str] = []
    metrics = run / "metrics.jsonl"
    lines = read_metrics(metrics, skip_damaged=True) if metrics.is_file() else []
    lines.sort(key=lambda line: line["step"])
    environment = _json(run / "environment.json", problems)
    if not environment:
        problems.append("environment.json is missing or empty: device and versions are not known")
    stored = _json(run / "report-extra.json", problems)
    return _Run(recipe, lines, environment, {**stored, **extra}, problems)


def _json(path: Path, problems: list[str]) -> dict:
    """The object in `path`; {} when there is none, with a line in `problems` when it is there but damaged."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path.name} holds {type(values).__name__}, not an object; it is left out")
        return {}
    return values


def _page(run: _Run, folder: Path) -> str:
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = (
        _header(run),
        "<section><h2>Curves</h2>",
        figures(run.recipe, run.lines, run.extra),
        "</section>",
        sections.perplexity(run.extra),
        sections.samples(run.extra),
        sections.resume(run.extra),
        sections.notes(run.extra),
        sections.checkpoints(_checkpoints(folder), keep=run.recipe.checkpoint.keep),
        f"<details><summary>Resolved recipe</summary><pre>{escape(dump_recipe(run.recipe))}</pre></details>",
        f"<footer>Written {time.strftime('%Y-%m-%d %H:%M')} from the run folder; metrics.jsonl holds every step.</footer>",
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(run.recipe.name)} · run report</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _header(run: _Run) -> str:
    recipe = run.recipe
    lead = f"{kind_of(recipe).title}, {_count(parameter_count(recipe))} parameters, {recipe.model.num_layers} layers"
    problems = "".join(f'<p class="warn">{escape(problem)}</p>' for problem in run.problems)
    return (
        f'<header><h1>{escape(recipe.name)}</h1><p class="lead">{escape(lead)}</p>{_state(run)}{problems}'
        f"{_headline(run)}{_facts(run)}</header>"
    )


def _state(run: _Run) -> str:
    planned = run.recipe.train.steps
    if not run.lines:
        return f'<p class="state">No step recorded of {planned:,} planned.</p>'
    done, skipped = run.lines[-1]["step"], sum(line.get("applied") is False for line in run.lines)
    text = f"All {planned:,} steps are done." if done >= planned else f"Step {done:,} of {planned:,}: not finished."
    warn = f' <span class="warn">{skipped:,} skipped: loss or gradient not finite.</span>' if skipped else ""
    return f'<p class="state">{text}{warn}</p>'


def _headline(run: _Run) -> str:
    lines = run.lines
    if not lines:
        return ""
    items = []
    for step, loss in [point for point in series(lines, "loss") if is_finite(point[1])][-1:]:
        items.append(("Training loss", short(loss), f"nats per token, step {step:,}"))
    for name, title in (("loss_full", "Held out, full"), ("loss_sparse", "Held out, sparse"), ("loss", "Held out")):
        points = series(lines, f"eval/{name}")
        if points:
            items.append((title, short(points[-1][1]), f"nats per token, step {points[-1][0]:,}"))
    sparsity = last_finite(series(lines, "eval/sparsity"))
    if sparsity:
        items.append(("Sparsity", short(sparsity), "attention mass in selected blocks"))
    speed = last_finite(series(lines, "tokens_per_second"))
    items.append(("Throughput", short(speed), "tokens/s, last 20 steps"))
    cells = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}<small>{escape(unit)}</small></dd></div>"
        for title, value, unit in items
    )
    return f'<dl class="headline">{cells}</dl>'


def _facts(run: _Run) -> str:
    recipe, environment = run.recipe, run.environment
    m, a, p, t = recipe.model, recipe.attention, recipe.parallel, recipe.train
    kind = kind_of(recipe)
    field = f", {a.block_count} blocks of {a.block_size} tokens" if kind.routed else ""
    align = f", alignment weight {a.alignment_weight:g}" if kind.aligned else ""
    planned = t.steps * t.global_batch_rows * t.sequence_length
    tokens = last_finite(series(run.lines, "tokens")) if run.lines else 0.0
    seen = "unknown number" if tokens is None else f"{tokens:,.0f}"
    seconds = sum(y for _, y in series(run.lines, "seconds") if is_finite(y))
    packages = environment.get("packages")
    packages = packages if isinstance(packages, dict) else {}
    versions = [f"Python {environment.get('python', 'unknown')}"] + [f"{k} {v}" for k, v in packages.items() if v]
    facts = {
        "Attention": f"{a.kind}{field}{align}",
        "Model": f"{parameter_count(recipe):,} parameters; width {m.hidden_size:,}, {m.num_heads} heads, "
        f"{m.num_kv_heads} key/value heads, vocabulary {m.vocab_size:,}",
        "Tokens": f"{seen} of {planned:,} planned; rows of {t.sequence_length:,}, {t.global_batch_rows:,} rows a step",
        "Device": f"{environment.get('device', 'unknown')}, {_processes(environment.get('world'))}; "
        f"tensor {p.tensor}, pipeline {p.pipeline}, context {p.context}, ZeRO stage {recipe.zero.stage}, {t.precision}",
        "Wall time": f"{_duration(seconds)} in the recorded steps, start-up not counted" if seconds else "not recorded",
        "Started": str(environment.get("started", "unknown")).replace("T", " "),
        "Versions": ", ".join(versions) if environment else "not recorded",
    }
    return f'<dl class="facts">{"".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())}</dl>'


def _checkpoints(run: Path) -> list[dict]:
    """Committed folders, newest first: step, tokens, bytes, time, and what is wrong with one that is."""
    pointer = run / "checkpoints" / LATEST
    latest = pointer.read_text().strip() if pointer.is_file() else None
    found = []
    for folder in committed(run):
        row = {"name": folder.name, "latest": folder.name == latest}
        try:
            manifest = Manifest.read(folder)
            row["problem"] = _missing_file(folder, manifest)
            row |= {"tokens": manifest.state.get("tokens"), "bytes": sum(f.bytes for f in manifest.files.values())}
            row |= {"files": len(manifest.files), "time": (folder / MANIFEST).stat().st_mtime}
        except CheckpointError as error:
            row["problem"] = error.problem.removeprefix(f"{folder}/")
        found.append(row)
    return found


def _missing_file(folder: Path, manifest: Manifest) -> str | None:
    for name, stored in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != stored.bytes:
            return f"{name} is missing or has another size than the manifest says"
    return None


def _processes(world: object) -> str:
    return "1 process" if world == 1 else f"{'unknown number of' if world is None else world} processes"


def _count(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"
