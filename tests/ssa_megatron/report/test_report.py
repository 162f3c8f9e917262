"""The report of a run: true values, axes that hold the data, escaped text, and a page whatever is missing.

Runs are made here, a few lines of metrics each; nothing is trained.
"""

import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from ssa_megatron.checkpoint.manifest import Manifest, StoredFile
from ssa_megatron.config import load_recipe
from ssa_megatron.config.recipe import dump_recipe
from ssa_megatron.errors import RunFolderError
from ssa_megatron.report import write_report
from ssa_megatron.report.figures import short, smoothed
from ssa_megatron.report.svg import Layer, chart, linear_axis, log_axis, thinned
from tests.errors import raises

HOSTILE = "<script>alert(\"1\")</script> & 'quoted'"


DEMO = load_recipe("demo")
TOKENS_A_STEP = DEMO.train.global_batch_rows * DEMO.train.sequence_length


def line(step, **values):
    """One plausible line of metrics.jsonl."""
    usual = {
        "loss": 7.6 - 0.01 * step,
        "alignment": 4.8e-5 * 1.02**step,
        "grad_norm": 1.3,
        "applied": True,
        "lr": 3e-3,
        "tokens": TOKENS_A_STEP * step,
        "tokens_per_second": 4000.0 + step,
        "seconds": 0.5,
    }
    return {"step": step, **usual, **values}


def evaluated(step, **values):
    found = {"loss_full": 6.0374, "loss_sparse": 6.1385, "sparsity": 0.6721, "entropy": 4.9745, "alignment": 3.8e-5}
    return line(step, **{f"eval/{name}": value for name, value in found.items()}, **values)


def make_run(folder, lines=None, overrides=(), environment=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump_recipe(load_recipe("demo", overrides)))
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    if environment is not None:
        (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def page_of(run, **arguments):
    path = write_report(run, **arguments)
    assert path == run / "report.html"
    assert not list(run.glob(".tmp-*"))
    page = path.read_text(encoding="utf-8")
    check_tags(page)
    return page


def check_tags(page):
    """Every element is closed in order, and every svg is XML of its own."""
    stack = []

    class Check(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta",):
                stack.append(tag)

        def handle_endtag(self, tag):
            assert stack.pop() == tag

        def handle_startendtag(self, tag, attrs):
            pass

    Check().feed(page)
    assert not stack
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def words(page):
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]*>", " ", page)))


def test_the_page_holds_the_values_of_the_metrics(tmp_path):
    environment = {"device": "cpu", "world": 2, "python": "3.11.7", "packages": {"torch": "2.13.0", "triton": None}}
    page = words(page_of(make_run(tmp_path, [*map(line, range(1, 200)), evaluated(200)], environment=environment)))
    assert "All 200 steps are done." in page
    for value in (
        "5.6",
        "6.037",
        "6.138",
        "0.6721",
        "4.974",
        "4,200",
        f"{200 * TOKENS_A_STEP:,} of {200 * TOKENS_A_STEP:,}",
        "1 min 40 s",
    ):
        assert value in page
    for text in ("demo", "Sparse Sparse Attention", "cpu, 2 processes", "torch 2.13.0", "alignment_weight: 10.0"):
        assert text in page
    assert "triton" not in page.split("Resolved recipe")[0]
    assert "nan" not in page.split("Resolved recipe")[0].lower().replace("finance", "")


def test_the_page_asks_for_nothing_from_outside(tmp_path):
    page = page_of(make_run(tmp_path, [evaluated(1), evaluated(2)]))
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert set(re.findall(r"https?://[^\"' ]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "prefers-color-scheme: dark" in page


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (2.9, 7.67), (-3, 3), (5, 5), (0, 0), (1e-5, 3.1e-5), (123456, 9876543), (6.001, 6.002)]
)
def test_linear_axes_cover_the_data_with_few_distinct_ticks(low, high):
    axis = linear_axis(low, high, ticks=4)
    labels = [text for _, text in axis.ticks]
    assert axis.low <= low <= high <= axis.high
    assert 3 <= len(labels) <= 7
    assert len(set(labels)) == len(labels)
    assert all(axis.low <= value <= axis.high for value, _ in axis.ticks)


@pytest.mark.parametrize(("low", "high"), [(3e-5, 2e-3), (0.1, 1.0), (1e-12, 1e5), (1, 1000), (0.9, 1.1)])
def test_log_axes_cover_the_data_with_few_ticks(low, high):
    axis = log_axis(low, high)
    assert axis.low <= low * (1 + 1e-9)
    assert axis.high >= high * (1 - 1e-9)
    assert 2 <= len(axis.ticks) <= 8


def drawn(svg):
    """(view box width, height, all points of polylines)."""
    root = ElementTree.fromstring(svg)
    width, height = map(float, root.get("viewBox").split()[2:])
    lines = root.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, pair.split(","))) for found in lines for pair in found.get("points").split()]
    return width, height, points


@pytest.mark.parametrize("log_above", [2.0, math.inf])
def test_every_point_lies_inside_the_plot(log_above):
    data = [(step, 10 ** math.sin(step)) for step in range(1, 3001)]
    text = {"label": "l", "x_label": "step", "y_label": "y"}
    svg = chart([Layer(data, "line", "train")], width=400, height=214, log_above=log_above, **text)
    width, height, points = drawn(svg)
    assert 300 < len(points) <= 800
    assert all(50 <= x <= width - 18 and 26 <= y <= height - 34 for x, y in points)
    assert ("log scale" in svg) == (log_above == 2.0)


def test_thinning_a_long_series_keeps_its_spike_and_its_gap():
    data = [(step, 1.0) for step in range(10_000)]
    data[4321] = (4321, 99.0)
    data[6000:6200] = [(step, math.nan) for step in range(6000, 6200)]
    kept = thinned(data, 100)
    assert len(kept) <= 200
    assert (4321, 99.0) in kept
    assert any(math.isnan(y) for _, y in kept)


def test_a_mean_over_steps_leaves_out_what_is_not_finite():
    assert smoothed([(1, 1.0), (2, math.inf), (3, 3.0)], 3) == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert smoothed([(x, float(x)) for x in range(9)], 5) == [(x, float(x)) for x in range(9)]
    assert math.isnan(smoothed([(1, math.nan)], 3)[0][1])


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (0.0, "0"), (6.03744, "6.037"), (4251.1, "4,251"), (4.809e-5, "4.81·10⁻⁵"), (math.nan, "not finite")],
)
def test_numbers_read_as_people_write_them(value, text):
    assert short(value) == text


@pytest.mark.parametrize("steps", [1, 2, 5, 39, 41])
def test_tiny_runs_give_all_curves_they_have(tmp_path, steps):
    page = page_of(make_run(tmp_path, [line(step) for step in range(1, steps + 1)]))
    assert f"Step {steps} of 200: not finished." in page
    assert "No evaluation has run yet: the first is due at step 50." in page
    assert "environment.json is missing" in page
    assert page.count("<polyline") > 0 or steps == 1


@pytest.mark.parametrize("content", [None, "", '{"step": 1, "lo'])
def test_a_run_with_only_a_recipe_says_so(tmp_path, content):
    run = make_run(tmp_path)
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    page = page_of(run)
    assert "No step recorded of 200 planned." in page
    assert "No step has been recorded yet" in page
    assert "No checkpoint is committed" in page


def test_skipped_steps_are_marked_and_curves_go_on(tmp_path):
    lines = [line(step) for step in range(1, 60)]
    lines[30] = line(31, loss=math.nan, grad_norm=math.inf, applied=False)
    page = page_of(make_run(tmp_path, lines))
    assert "1 skipped: loss or gradient not finite." in page
    assert "step 31: not finite" in page
    assert "1 step not finite" in page
    assert not re.search(r'points="[^"]*(nan|inf)', page)


def test_a_run_without_one_finite_value_has_no_curve_but_a_page(tmp_path):
    bad = {name: math.nan for name in ("loss", "alignment", "grad_norm", "eval/loss_full", "eval/sparsity")}
    page = page_of(make_run(tmp_path, [line(step, **bad) for step in (1, 2, 3)]))
    assert "Recorded, but never finite." in page
    assert "Evaluated, but never finite." in page


def test_lines_of_other_shapes_are_left_out(tmp_path):
    lines = [line(1), 3, {"loss": 1.0}, line(2, loss="high", lr=None), {"step": 3, "seconds": math.nan}]
    assert "Step 3 of 200" in page_of(make_run(tmp_path, lines))


def test_a_step_that_recorded_nothing_leaves_sentences(tmp_path):
    page = words(page_of(make_run(tmp_path, [{"step": 1}])))
    assert page.count("Not in metrics.jsonl.") == 5
    assert f"unknown number of {200 * TOKENS_A_STEP:,} planned" in page


@pytest.mark.parametrize("kind", ["full", "moba", "nsa"])
def test_kinds_of_one_stream_show_one_held_out_loss(tmp_path, kind):
    entry = line(50, **{"eval/loss": 6.25, "eval/sparsity": 0.0, "eval/entropy": 0.0})
    page = words(page_of(make_run(tmp_path, [line(1), entry], [f"attention.kind={kind}"])))
    assert "6.25" in page
    assert f"Attention of kind {kind} has no alignment loss." in page
    assert f"Not measured for attention of kind {kind}." in page


def test_a_recipe_without_evaluation_says_which_setting(tmp_path):
    assert "train.eval_interval is 0" in page_of(make_run(tmp_path, [line(1)], ["train.eval_interval=0"]))


EXTRA = {
    "unigram_entropy": 5.8731,
    "samples": [{"mode": "sparse", "prompt": "In the beginning", "text": HOSTILE, "tokens_per_second": 212.4}],
    "perplexity": [
        {"mode": "full", "block_count": None, "nats": 3.25, "perplexity": 25.79},
        {"mode": "sparse", "block_count": 4, "nats": 3.31, "perplexity": 27.3851},
        {"mode": "sparse", "block_count": "all", "nats": 3.25, "perplexity": math.inf},
    ],
    "resume": {
        "killed_at_step": 3, "resumed_from_step": 2, "steps_compared": 7, "losses_equal": True, "weights_equal": False,
        "sha256": "9f2c5d",
    },
    "notes": ["One note & another."],
}  # fmt: skip


def test_extra_becomes_sections_and_marks_in_the_figure(tmp_path):
    page = page_of(make_run(tmp_path, [evaluated(1), evaluated(5)]), extra=EXTRA)
    assert '<line class="rule"' in page
    assert '<line class="vertical"' in page
    shown = words(page)
    for text in (
        "unigram entropy, 5.8731", "killed at step 3", "212.4 tokens/s", "27.39", "+0.0600", "not finite",
        "from step 2", "equal , 7 steps compared", "not equal , compared", "9f2c5d", "One note & another.",
    ):  # fmt: skip
        assert text in shown


def test_the_unigram_entropy_lies_inside_the_axis_even_far_from_the_losses(tmp_path):
    page = page_of(make_run(tmp_path, [line(1), line(2)]), extra={"unigram_entropy": 20.0})
    heights = [float(y) for y in re.findall(r'class="rule" x1="50.0" y1="([\d.]+)"', page)]
    assert heights
    assert all(y >= 26 for y in heights)


def test_stored_extra_is_merged_under_what_the_caller_gives(tmp_path):
    run = make_run(tmp_path, [line(1)])
    (run / "report-extra.json").write_text(json.dumps({"notes": ["stored"], "unigram_entropy": 5.5}))
    assert "<li>stored</li>" in page_of(run)
    page = page_of(run, extra={"notes": ["given"]})
    assert "<li>given</li>" in page
    assert "<li>stored</li>" not in page
    assert "unigram entropy, 5.5000" in page


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_damaged_side_files_are_named_not_raised(tmp_path, content):
    run = make_run(tmp_path, [line(1)])
    for name in ("report-extra.json", "environment.json"):
        (run / name).write_bytes(content.encode(errors="surrogateescape"))
    page = page_of(run)
    assert 'class="warn">report-extra.json' in page
    assert 'class="warn">environment.json' in page


@pytest.mark.parametrize("odd", [3, "text", {}, [], [3], [None], {"a": 1}, [{}], [[]], True])
def test_extra_of_another_shape_still_gives_a_page(tmp_path, odd):
    keys = ("unigram_entropy", "samples", "perplexity", "resume", "notes")
    page_of(make_run(tmp_path, [line(1), line(2)]), extra=dict.fromkeys(keys, odd))


def test_all_text_is_escaped(tmp_path):
    environment = {
        "device": HOSTILE,
        "python": HOSTILE,
        "packages": {HOSTILE: HOSTILE},
        "started": HOSTILE,
        "world": HOSTILE,
    }
    run = make_run(tmp_path, [line(1)], environment=environment)
    (run / "config.yaml").write_text(dump_recipe(load_recipe("demo").model_copy(update={"name": HOSTILE})))
    fields = dict.fromkeys(("mode", "prompt", "text", "block_count", "sha256", "killed_at_step"), HOSTILE)
    extra = {"samples": [fields], "perplexity": [fields], "resume": fields, "notes": [HOSTILE]}
    page = page_of(run, extra=extra)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 12


def make_checkpoint(run, step, content=b"1234"):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "rank-00000-000.safetensors").write_bytes(content)
    files = {"rank-00000-000.safetensors": StoredFile(bytes=4, sha256="0")}
    manifest = Manifest(step, {"tokens": 4096 * step}, {}, "r", "t", files, {})
    (folder / "manifest.json").write_text(manifest.to_json())
    (folder.parent / "latest").write_text(folder.name + "\n")
    return folder


def test_checkpoints_are_listed_newest_first_with_what_is_wrong(tmp_path):
    run = make_run(tmp_path, [line(1)])
    (make_checkpoint(run, 40) / "manifest.json").write_text("{")
    make_checkpoint(run, 80, content=b"12")
    make_checkpoint(run, 120)
    page = words(page_of(run))
    assert re.findall(r"step-\d+", page) == ["step-00000120", "step-00000080", "step-00000040"]
    assert "491,520" in page
    assert "complete, latest" in page
    assert "rank-00000-000.safetensors is missing or has another size" in page
    assert "not a readable manifest" in page


@pytest.mark.parametrize("what", ["absent", "empty folder", "a file"])
def test_not_a_run_folder_is_refused_with_its_path(tmp_path, what):
    target = tmp_path / "run"
    if what == "empty folder":
        target.mkdir()
    elif what == "a file":
        target.write_text("")
    with raises(RunFolderError, "config-yaml-unreadable", target) as caught:
        write_report(target)
    assert caught.value.remedy
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_report_replaces_the_earlier_one_and_survives_a_failed_attempt(tmp_path, monkeypatch):
    run = make_run(tmp_path, [line(1)])
    (run / "report.html").write_text("earlier")
    monkeypatch.setattr("ssa_megatron.files.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "report.html").read_text() == "earlier"
    monkeypatch.undo()
    assert "<h1>demo</h1>" in page_of(run)
