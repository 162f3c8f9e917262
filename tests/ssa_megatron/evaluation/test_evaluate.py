"""`ssa evaluate` as a whole: runs and folders give the same numbers, results can be put side by side, mistakes are named."""

import json
import math
import re
import shutil
from xml.etree import ElementTree

import pytest
import torch
import typer

import ssa_pipelines
from ssa_megatron.cli import app
from ssa_megatron.errors import CheckpointError, ConfigError, DataProblem, EnvironmentProblem
from ssa_megatron.evaluation.evaluate_command import evaluate
from ssa_megatron.evaluation.evaluation_page import write_page
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.needle import needle
from ssa_megatron.evaluation.scores import perplexity_by_length, quality_against_budget
from ssa_megatron.evaluation.tables import differences, render, tables
from ssa_megatron.evaluation.targets import SCHEMA, Opened, names, opened
from ssa_megatron.evaluation.text import from_sources, held_out
from ssa_megatron.hf.bare import load_tokenizer
from tests.errors import raises
from tests.ssa_megatron.hf.conftest import corpus

SMALL = Settings(lengths=(64, 160), budgets=(1, 3, "all"), tokens=400, sequences=2, depths=(0.0, 1.0))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(corpus(), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def done(tmp_path_factory, run, folder, written):
    out = tmp_path_factory.mktemp("evaluation")
    evaluate([run, folder], SMALL, out=out, sources=[str(written)])
    return out


def results(out):
    found = json.loads((out / "results.json").read_text())
    assert found["schema"] == SCHEMA
    return found["models"]


def test_a_run_and_its_export_give_the_same_numbers(done, run, folder):
    one, other = results(done)
    assert one["name"] != other["name"]
    for part in ("budget", "length", "needle", "attention", "text", "settings", "weights_sha256", "recipe_digest"):
        assert one[part] == other[part], part
    assert one["weights_sha256"] == json.loads((folder / "parity.json").read_text())["weights_sha256"]
    assert one["settings"]["seed"] == 0
    assert one["settings"]["lengths"] == [64, 160]
    assert re.fullmatch("[0-9a-f]{64}", one["text"]["sha256"])
    assert differences([one, other]) == []


def test_every_table_and_picture_is_on_the_page(done):
    page = (done / "report.html").read_text()
    found = results(done)
    for table in tables(found, detail=True):
        for row in table.rows:
            for cell in row:
                assert cell is None or str(cell) in page, (table.title, cell)
    wide = len(list(done.glob("budget*.svg"))) + 1
    assert page.count('<div class="drawing narrow"><svg') == wide  # a telephone gets its own
    assert page.count("<svg viewBox") == 2 * wide + 2 * 2 + 2 + 2 * 2
    assert "<script" not in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    for path in done.glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.attrib["width"]
    assert len(list(done.glob("*.svg"))) == wide + 10


def several(done, count: int) -> list[dict]:
    """`count` models, each a little worse than the one before, without running any."""
    found = []
    for number in range(count):
        model = json.loads(json.dumps(results(done)[0]))
        model["name"] = f"model {number}"
        for layer in model["attention"]["layers"]:
            layer["entropy"] = [entropy + number for entropy in layer["entropy"]]
        found.append(model)
    return found


def test_the_page_begins_with_one_row_a_model_of_what_is_asked_first(done):
    (first, *_), (one, _) = tables(results(done)), results(done)
    assert first.title == "At a glance"
    shown = dict(zip(first.heads, first.rows[0], strict=True))
    full, sparse = (next(row for row in one["budget"]["rows"] if row["mode"] == mode) for mode in ("full", "sparse"))
    sparse = next(row for row in one["budget"]["rows"] if row["block_count"] == 3 and row["mode"] == "sparse")
    assert shown["*perplexity"] == f"{full['perplexity']:.2f} / {sparse['perplexity']:.2f}"
    assert shown["*sparse over full, nats"].startswith(f"{sparse['gap']:+.4f}")
    ends = [next(row for row in one["length"]["rows"] if row["mode"] == "full"), None]
    ends[1] = next(row for row in one["length"]["rows"] if row["mode"] == "sparse" and row["block_count"] == 3)
    assert shown["*perplexity, 64-160"] == " / ".join(f"{math.exp(row['nats'][-1]):.2f}" for row in ends)
    cells = [cell["ranked"] for cell in one["needle"]["cells"] if cell["mode"] == "full"]
    assert shown["*needles found"].startswith(f"{sum(cells) / len(cells):.2f} / ")
    only = [{key: value for key, value in one.items() if key not in ("length", "needle", "attention")}]
    assert tables(only)[0].heads == ("Model", "*perplexity", "*sparse over full, nats")
    without = {**only[0], "budget": {**one["budget"], "rows": [full]}}  # the own number of blocks was not asked for
    assert tables([without])[0].rows[0][1:] == (f"{full['perplexity']:.2f} / —", None)
    assert tables([{key: value for key, value in only[0].items() if key != "budget"}])[0].title == "Models"


def test_a_gap_that_rounds_to_nothing_has_no_minus(done):
    one = several(done, 1)
    for row in one[0]["budget"]["rows"]:
        row["gap"], row["gap_error"] = -0.00001, None
    (budget,) = (table for table in tables(one) if table.part == "budget")
    assert {row[2] for row in budget.rows[1:]} == {"+0.0000"}


def test_tables_of_many_models_are_no_wider_than_the_page(done):
    """Four models' nats and gaps side by side were cut at the page's edge."""
    for count, wanted in ((1, 1), (2, 1), (3, 2), (4, 2)):
        budget = [table for table in tables(several(done, count)) if table.part == "budget"]
        assert len(budget) == wanted
        assert all(len(table.heads) <= 5 for table in budget)
        rows = {row[0] for table in budget for row in table.rows}
        assert rows == {"full", "sparse k=1", "sparse k=3", "sparse k=all"}
    assert budget[1].rows[0][1] is None
    assert all(cell[0] in "+-" for row in budget[1].rows[1:] for cell in row[1:])


def test_equal_colours_are_equal_entropies_in_every_model(done, tmp_path):
    """Each model's map once had a scale of its own."""
    found = several(done, 3)
    write_page(tmp_path, found)
    every = [entropy for model in found for layer in model["attention"]["layers"] for entropy in layer["entropy"]]
    ends = (f">{min(every):.2f}</text>", f">{max(every):.2f}</text>")
    scaled = [path.name for path in tmp_path.glob("attention-*.svg") if all(end in path.read_text() for end in ends)]
    assert len(scaled) == 3
    shares = {}
    for number, path in enumerate(sorted(scaled)):
        said = re.findall(
            r'fill-opacity="([0-9.]+)"><title>head \d+, layer \d+: ([0-9.e+-]+)</title>', (tmp_path / path).read_text()
        )
        assert len(said) == 8
        for opacity, value in said:
            share = (float(value) - min(every)) / (max(every) - min(every))
            assert float(opacity) == pytest.approx(0.04 + 0.96 * share, abs=2e-3)
        shares[number] = said
    assert shares[0] != shares[1]


def test_budgets_near_the_models_own_have_a_picture_where_the_smallest_dwarf_them(done, tmp_path):
    found = several(done, 1)
    gaps = {1: 0.5, 2: 0.002, 3: -0.001, 4: 0.0005, 8: 0.0}
    row = next(row for row in found[0]["budget"]["rows"] if row["mode"] == "sparse")
    found[0]["budget"]["rows"][1:] = [{**row, "block_count": count, "gap": gap} for count, gap in gaps.items()]
    write_page(tmp_path, found)
    near = (tmp_path / "budget-1.svg").read_text()
    assert "close to the model" in near
    assert near.count("<circle") == 4  # 2, 3, 4 and 8 blocks
    found[0]["budget"]["rows"][1]["gap"] = 0.003
    write_page(tmp_path, found)
    assert (tmp_path / "budget.svg").exists()
    assert not (tmp_path / "budget-1.svg").exists()


def test_colours_of_the_page_are_in_its_style_sheet(done):
    page = (done / "report.html").read_text()
    style, body = page.split("</style>", 1)
    for names_ in set(re.findall(r'class="((?:line|dot|cell|vertical|rule)[^"]*)"', body)):
        for name in names_.split():
            assert re.search(rf"\.{name}\b", style), name


def test_results_of_an_earlier_evaluation_stand_beside_new_ones(done, folder, written, tmp_path, capsys):
    # other settings, one part: said to differ, shown all the same
    evaluate(
        [done / "results.json", folder], Settings(parts=("budget",), tokens=200), out=tmp_path, sources=[str(written)]
    )
    found = results(tmp_path)
    first, second = (model["name"] for model in results(done))
    assert [model["name"] for model in found] == [first, second, f"{second} (2)"]
    (said,) = {line.partition("different settings: ")[2] for line in differences(found)}
    assert "lengths" in said
    assert "tokens" in said
    assert said in (tmp_path / "report.html").read_text()
    assert "Quality against budget" in capsys.readouterr().out


def test_console_tables_are_aligned(done):
    for table in tables(results(done)):
        title, *lines = render(table).splitlines()
        assert title == table.title
        heads = [head.lstrip("*") for head in table.heads]
        assert all(head in lines[0] for head in heads)
        assert max(map(len, lines[1 : 1 + len(table.rows)])) <= len(lines[0]) + 40


def test_held_out_documents_are_whole_again(tokenizer, tmp_path):
    documents = [f"{part}\nnumber {i}" for i, part in enumerate(corpus().split("\n\n")[:60])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    ssa_pipelines.prepare(
        [tmp_path / "d.jsonl"], tokenizer.path, tmp_path / "data", row_length=64, validation_fraction=0.3, workers=1
    )
    found = held_out(str(tmp_path / "data"), 10**9)
    assert 5 < len(found.documents) < 60
    assert set(found.documents) <= set(documents)
    few = held_out(str(tmp_path / "data"), 500)
    assert few.documents == found.documents[: len(few.documents)]
    assert few.fingerprint["bytes"] >= 500
    assert few.fingerprint["sha256"] != found.fingerprint["sha256"]


def test_rope_scaling_is_the_models_own_and_is_named(folder, written, tmp_path):
    from transformers import AutoModelForCausalLM

    settings = Settings(parts=("length",), lengths=(128, 256), sequences=1, budgets=("all",), rope_factor=4.0)
    evaluate([folder], settings, out=tmp_path, sources=[str(written)])
    (model,) = results(tmp_path)
    assert model["rope"]["rope_type"] == "llama3"
    assert model["rope"]["factor"] == 4
    assert "llama3 x 4" in (tmp_path / "report.html").read_text()
    scaling = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 128, "rope_theta": model["rope"]["rope_theta"]}
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, rope_parameters=scaling, dtype="auto")
    own = perplexity_by_length(
        Opened(loaded.eval(), load_tokenizer(folder), {}, folder), from_sources([str(written)], 10**6), settings
    )
    assert own["rows"][0]["nats"] == pytest.approx(model["length"]["rows"][0]["nats"], rel=1e-6)
    evaluate(
        [folder], Settings(parts=("length",), lengths=(128, 256), sequences=1), out=tmp_path, sources=[str(written)]
    )
    assert results(tmp_path)[0]["length"]["rows"][0]["nats"] != pytest.approx(own["rows"][0]["nats"], rel=1e-6)


def test_other_precisions_are_named_and_change_the_numbers_little(done, folder, written, tmp_path):
    evaluate([folder], Settings(parts=("budget",), tokens=400, dtype="bf16"), out=tmp_path, sources=[str(written)])
    (model,) = results(tmp_path)
    assert model["dtype"] == "bfloat16"
    full, exact = model["budget"]["rows"][0]["nats"], results(done)[0]["budget"]["rows"][0]["nats"]
    assert full == pytest.approx(exact, rel=0.05)
    assert full != exact


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        ({"parts": ("budget", "speed")}, ["--parts", "speed"]),
        ({"parts": ("tasks",)}, ["--parts", "tasks"]),
        ({"lengths": (512, 256)}, ["--lengths"]),
        ({"lengths": (1,)}, ["--lengths"]),
        ({"budgets": (0,)}, ["--budgets", 0]),
        ({"budgets": ()}, ["--budgets"]),
        ({"tokens": 0}, ["--tokens", 0]),
        ({"haystacks": 0}, ["--haystacks", 0]),
        ({"depths": (1.5,)}, ["--depths", 1.5]),
        ({"candidates": 1}, ["--candidates", 1]),
        ({"rope_factor": 0.5}, ["--rope-factor", 0.5]),
        ({"dtype": "int8"}, ["--dtype", "int8"]),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_name(options, mentions):
    with raises(ConfigError, "evaluation-setting", *mentions) as raised:
        Settings(**options)
    assert raised.value.remedy


def test_targets_and_texts_that_are_none_are_refused(folder, written, tmp_path):
    def fails(kind, id, targets, *mentions, **options):
        with raises(kind, id, *mentions) as raised:
            evaluate(targets, SMALL, out=tmp_path / "out", **options)
        assert raised.value.remedy
        assert "\n" not in raised.value.problem

    text = {"sources": [str(written)]}
    fails(CheckpointError, "unknown-target", [tmp_path / "missing"], tmp_path / "missing", **text)
    fails(CheckpointError, "unknown-target", [written], written, **text)
    fails(ConfigError, "no-evaluation-text", [folder])
    fails(ConfigError, "target-twice", [folder, folder], **text)
    fails(ConfigError, "text-and-data", [folder], data="d", **text)
    device = "cuda:7" if not torch.cuda.is_available() else "x"
    fails(EnvironmentProblem, "device-unusable", [folder], device, device=device, **text)
    fails(ConfigError, "step-of-an-export", [folder], "--step 3", step=3, **text)
    (tmp_path / "other.json").write_text('{"schema": "ssa-evaluation/0", "models": []}')
    fails(CheckpointError, "results-schema", [tmp_path / "other.json"], "ssa-evaluation/0")
    (tmp_path / "broken.json").write_text("{")
    fails(CheckpointError, "not-results", [tmp_path / "broken.json"], "broken.json")
    (tmp_path / "short.txt").write_text("In the beginning")
    fails(DataProblem, "text-shorter-than-sequence", [folder], 160, sources=[str(tmp_path / "short.txt")])
    (tmp_path / "file").write_text("")
    with raises(ConfigError, "evaluation-folder-not-made", tmp_path / "file"):
        evaluate([folder], SMALL, out=tmp_path / "file", **text)


def test_the_verb_reads_its_options(folder, written, tmp_path, capsys):
    command = typer.main.get_command(app)
    arguments = [
        "evaluate",
        str(folder),
        "--text",
        str(written),
        "--parts",
        "budget",
        "--tokens",
        "150",
        "--budgets",
        "2,all",
    ]
    command([*arguments, "--out", str(tmp_path)], standalone_mode=False)
    assert [row["block_count"] for row in results(tmp_path)[0]["budget"]["rows"]] == [None, 2, 8]
    assert str(tmp_path / "report.html") in capsys.readouterr().out
    with raises(ConfigError, "setting-not-a-number", "--budgets", "'many'"):
        command([*arguments, "--budgets", "4,many"], standalone_mode=False)


def test_likelihoods_that_are_no_numbers_are_refused(folder, body, tmp_path):
    for part in (quality_against_budget, perplexity_by_length, needle):
        with opened(folder, "broken", step=None, device="cpu", dtype=None) as one:
            one.model.model.norm.weight.data[3] = float("nan")
            with raises(CheckpointError, "likelihoods-not-finite", "broken", "full"):
                part(one, body, SMALL)


def test_what_does_not_fit_is_refused_before_anything_is_measured(folder, written, tmp_path, capsys):
    with raises(ConfigError, "context-without-needle", "--lengths", 20):
        evaluate([folder], Settings(lengths=(20, 64)), out=tmp_path, sources=[str(written)])
    assert "budget" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        lambda models: models[0]["budget"]["rows"][0].pop("nats"),
        lambda models: models[0]["attention"]["bins"][0].pop("bound"),  # of the pictures alone
        lambda models: models[1].pop("versions"),  # of the settings at the page's end
        lambda models: models.insert(0, {}),
        lambda models: models.insert(0, "a model"),
        lambda models: models[0].update(length=[]),
    ],
)
def test_damaged_results_are_refused_before_anything_is_measured(done, folder, tmp_path, damage):
    models = results(done)
    damage(models)
    (tmp_path / "results.json").write_text(json.dumps({"schema": SCHEMA, "models": models}))
    with raises(CheckpointError, "results-damaged", tmp_path / "results.json") as raised:
        evaluate([folder, tmp_path / "results.json"], SMALL, out=tmp_path / "out")
    assert "\n" not in raised.value.problem
    assert not (tmp_path / "out").exists()


def test_a_damaged_parity_report_is_named(folder, tmp_path):
    for content in ("{", "[1]"):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        shutil.copytree(folder, tmp_path / "broken")
        (tmp_path / "broken" / "parity.json").write_text(content)
        with (
            raises(CheckpointError, "parity-damaged", "parity.json"),
            opened(tmp_path / "broken", "broken", step=None, device="cpu", dtype=None),
        ):
            pass


def test_pictures_of_an_earlier_evaluation_do_not_stay(done, folder, written, tmp_path):
    for name in ("needle-9.svg", "budget.svg", "mine.svg"):
        (tmp_path / name).write_text("old")
    evaluate([folder], Settings(parts=("attention",), sequences=1), out=tmp_path, sources=[str(written)])
    assert {path.name for path in tmp_path.glob("*.svg")} == {"mine.svg", *(f"attention-{i}.svg" for i in range(4))}


def test_names_are_as_short_as_they_can_be(tmp_path):
    assert names([tmp_path / "a/x", tmp_path / "b/y"]) == ["x", "y"]
    assert names([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]
