"""A run on several weighted sources: it trains, says what a step saw, and refuses changed data unless there is a reason."""

import json

from typer.testing import CliRunner

import ssa_pipelines
from ssa_megatron import cli, cli_data
from ssa_megatron.config import dump_recipe
from tests import launch
from tests.errors import raises
from tests.pipelines.object_store import object_store
from tests.ssa_megatron.support import tiny


def test_a_mixed_run_trains_tells_what_a_step_saw_and_goes_on_with_other_data_only_for_a_reason(
    tmp_path, corpus, tokenizer
):
    texts = {"a": corpus[:9], "b": corpus[9:], "c": corpus[3:]}
    for name, chosen in texts.items():
        ssa_pipelines.prepare(iter(chosen), tokenizer, tmp_path / name, row_length=33, validation_fraction=0.1)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_recipe(tiny(model__vocab_size=400, logging__tensorboard=False, train__eval_interval=0)))
    run = tmp_path / "run"

    def train(other: str, steps: int, *more: str) -> list[str]:
        sources = json.dumps({"a": str(tmp_path / "a"), "b": str(tmp_path / other)})
        phases = json.dumps([{"from_tokens": 0, "weights": {"a": 1, "b": 3}}])
        data = [f"data.sources={sources}", f"data.phases={phases}", "data.path=null"]
        return [
            "train",
            str(recipe),
            *data,
            "checkpoint.interval=2",
            f"train.steps={steps}",
            *more,
            "--run-folder",
            str(run),
        ]

    reason = "data.accept_changes=b was found to be garbled"
    cases = [
        train("b", 4),
        ["data", "ledger", str(run), "3"],
        train("c", 4),
        train("c", 4, reason),
        train("b", 4, "data.phases=[]", "data.sources={}"),
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    launch.run(1, "tests.workers.command_lines", str(tmp_path / "cases.json"), str(tmp_path / "out.json"), timeout=200)
    first, ledger, changed, accepted, nothing = json.loads((tmp_path / "out.json").read_text())
    assert first["code"] == 0, first["output"]
    assert ledger["code"] == 0, ledger["output"]
    rows = [json.loads(line) for line in ledger["output"].splitlines()]
    size = tiny().train.global_batch_rows
    assert [row["position"] for row in rows] == list(range(2 * size, 3 * size))
    assert {row["source"] for row in rows} <= {"a", "b"}
    assert all(document["file"] == "documents" for row in rows for document in row["documents"])
    assert changed["code"] == 3
    assert "saved position: dataset of source b is" in changed["output"]
    assert "data.accept_changes=REASON" in changed["output"]
    assert accepted["code"] == 0, accepted["output"]
    assert nothing["code"] == 2
    assert "data.path is not given" in nothing["output"]


def test_a_dataset_in_a_store_is_verified_and_counted_from_the_command_line(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with object_store() as store:
        url = store.put_folder(dataset, "data")
        for verb in ("verify", "stats"):
            said = CliRunner().invoke(cli.app, ["data", verb, url], catch_exceptions=False)
            assert json.loads(said.stdout)["path"] == url
            assert json.loads(said.stdout)["splits"].keys() == {"train", "validation"}


def test_a_path_with_an_equals_sign_is_no_named_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lang=en").mkdir()
    assert cli_data._named(["lang=en/part-0.parquet", "lang=en/*.jsonl"]) == [
        "lang=en/part-0.parquet",
        "lang=en/*.jsonl",
    ]
    assert cli_data._named(["lang=en/a.txt", "/data/lang=en/a.txt", "s3://bucket/lang=en/"]) == [
        "lang=en/a.txt", "/data/lang=en/a.txt", "s3://bucket/lang=en/"
    ]  # fmt: skip
    assert cli_data._named(["web=lang=en/a.txt", "web=b", "code=c"]) == {"web": ["lang=en/a.txt", "b"], "code": ["c"]}
    with raises(cli_data.ConfigError, "source-without-name", "'lang=en/a.txt'"):
        cli_data._named(["lang=en/a.txt", "code=c"])
