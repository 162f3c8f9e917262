"""`ssa evaluate`: open each target in turn, measure the same on all of them, leave results.json, report.html and pictures.

Everything a user can get wrong is refused before the first model is loaded, as far as it can be known. Results are written
after every target, so an evaluation that is stopped keeps what it has.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from ssa_megatron import __version__
from ssa_megatron.errors import ConfigError, EnvironmentProblem
from ssa_megatron.evaluation import tasks, text
from ssa_megatron.evaluation.attention_mass import attention
from ssa_megatron.evaluation.evaluation_page import write_page
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.needle import build, needle, stream
from ssa_megatron.evaluation.scores import perplexity_by_length, quality_against_budget
from ssa_megatron.evaluation.tables import render, tables
from ssa_megatron.evaluation.targets import SCHEMA, Opened, earlier, kind_of, names, opened, recipe_of, unlike
from ssa_megatron.files import replace_durably

BYTES_PER_TOKEN = 8
"""More than any tokenizer's mean: how much text is read for a number of tokens."""


def evaluate(
    targets: Sequence[Path],
    settings: Settings,
    *,
    out: Path,
    sources: Sequence[str] = (),
    data: str | None = None,
    haystack: Sequence[str] = (),
    step: int | None = None,
    device: str = "cpu",
) -> Path:
    """Measure, print tables, and return the path of the report.

    sources: files of text; data: a prepared dataset, whose held-out documents are taken; without either, those of the
    first target that is a run. haystack: files of text for the needle, by default the text itself. Raises ConfigError,
    DataProblem, CheckpointError, EnvironmentProblem.
    """
    kinds = {target: kind_of(target) for target in targets}
    known = {target: earlier(target) for target, kind in kinds.items() if kind == "results"}
    fresh = [target for target in targets if target not in known]
    short = dict(zip(fresh, names(fresh), strict=True))
    _check_device(device)
    if fresh and "tasks" in settings.parts:
        tasks.check(settings.tasks)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out {out}: cannot be made ({error.strerror})",
            remedy="give another folder",
            id="evaluation-folder-not-made",
        ) from None
    found: list[dict] = []
    body = straw = None
    for target in targets:
        taken = [model["name"] for model in found]
        if target in known:
            for model in known[target]:
                found.append({**model, "name": unlike(model["name"], [other["name"] for other in found])})
            continue
        with opened(target, unlike(short[target], taken), step=step, device=device, dtype=settings.dtype) as one:
            settings = settings.for_length(one.trained_length)
            if body is None:
                size = _bytes(settings, one.trained_length)
                body = _text(sources, data, fresh, size)
                straw = text.from_sources(haystack, size) if haystack else body
            _foresee(one, body, straw, settings)
            print(f"=== {one.identity['name']}: {one.identity['kind']}, step {one.identity['step']}", flush=True)
            found.append(measure(one, body, straw, settings))
        _write(out / "results.json", found)
    if not found:
        raise ConfigError(
            "no model to show",
            remedy="name a run folder, an exported folder or a results.json",
            id="no-model-to-evaluate",
        )
    _write(out / "results.json", found)
    for table in tables(found):
        print(f"\n{render(table)}")
    report = write_page(out, found)
    print(f"\n{report}")
    return report


def measure(one: Opened, body: text.Text, haystack: text.Text, settings: Settings) -> dict:
    """One model's entry in results.json."""
    rope = stretch(one.model.config, settings.rope_factor)
    parts = {
        "budget": lambda: quality_against_budget(one, body, settings),
        "length": lambda: perplexity_by_length(one, body, settings),
        "needle": lambda: needle(one, haystack, settings),
        "attention": lambda: attention(one, body, settings),
        "tasks": lambda: tasks.run(one, settings),
    }
    results, seconds = {}, {}
    for part in settings.parts:
        began = time.monotonic()
        results[part] = parts[part]()
        seconds[part] = round(time.monotonic() - began, 2)
        print(f"    {part}: {seconds[part]:.1f} s", flush=True)
    return {
        **one.identity,
        "rope": rope,
        "text": body.fingerprint,
        "settings": settings.to_dict(),
        "versions": {"ssa": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "seconds": seconds,
        **results,
    }


def stretch(config, factor: float | None) -> dict:
    """Sets Llama-3 RoPE scaling on an open model's configuration, or leaves it; returns what is in force."""
    if factor is not None:
        rope = {
            "rope_type": "llama3",
            "factor": float(factor),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": config.max_position_embeddings,
            "rope_theta": config.rope_parameters["rope_theta"],
        }
        config.rope_parameters = rope
    return dict(config.rope_parameters)


def _text(sources: Sequence[str], data: str | None, targets: Sequence[Path], size: int) -> text.Text:
    if sources and data:
        raise ConfigError("--text and --data are both given", remedy="give one of them", id="text-and-data")
    if sources:
        return text.from_sources(sources, size)
    if data:
        return text.held_out(data, size)
    recipe = next(filter(None, map(recipe_of, targets)), None)
    if recipe is None:
        raise ConfigError(
            "no text to evaluate on: no target is a run folder, which would name its data",
            remedy="--data DATASET, --text FILE, or --text package:king-james",
            id="no-evaluation-text",
        )
    return text.of_run(recipe, size)


def _foresee(one: Opened, body: text.Text, haystack: text.Text, settings: Settings) -> None:
    """Lengths that the text or the needle does not fit are refused now, not after minutes of other parts."""
    if "length" in settings.parts:
        text.sequences(one.tokenizer, body, settings.lengths[-1], 1)
    if "attention" in settings.parts:
        text.sequences(one.tokenizer, body, one.trained_length, 1)
    if "needle" in settings.parts:
        hay = stream(one.tokenizer, haystack)
        for context in settings.lengths:
            build(one.tokenizer, hay, context, 0.5, f"{settings.seed} 0", settings.candidates)


def _bytes(settings: Settings, trained: int) -> int:
    return BYTES_PER_TOKEN * max(settings.tokens, settings.sequences * max(*settings.lengths, trained))


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise EnvironmentProblem(
            f"--device {device}: {str(error).splitlines()[0]}",
            remedy="use cpu, or a machine with that device",
            id="device-unusable",
        ) from None


def _write(path: Path, found: list[dict]) -> None:
    replace_durably(path, json.dumps({"schema": SCHEMA, "models": found}, indent=1) + "\n")
