"""Recipes: what the packaged ones say, how they are changed, and how a mistake in one is answered."""

import pytest
import yaml

from ssa_megatron.config import digest, dump_recipe, load_recipe, packaged_recipes, resolve
from ssa_megatron.config.recipe import differences
from ssa_megatron.errors import ConfigError
from tests.errors import raises
from tests.golden import RECIPES
from tests.ssa_megatron.support import TINY, tiny


# ------------------------------------------------------------------------------------------------ packaged recipes
def test_the_packaged_recipes_are_those_the_readme_names():
    assert packaged_recipes() == [
        "demo",
        "full-1b",
        "moba-1b",
        "nsa-1b",
        "ssa-1b",
        "ssa-300m",
        "ssa-70b-128k",
        "ssa-8b",
    ]


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_resolves_to_its_golden_file(name):
    golden = (RECIPES / f"{name}.yaml").read_text()
    assert dump_recipe(load_recipe(name)) == golden, "python -m tests.golden.regenerate, then read the diff"


def test_there_is_no_golden_file_without_a_recipe():
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == packaged_recipes()


@pytest.mark.parametrize("kind", ["full", "moba", "nsa", "ssa"])
def test_the_1b_recipes_hold_the_papers_numbers(kind):
    recipe = load_recipe(f"{kind}-1b")
    assert recipe.attention.kind == kind
    m = recipe.model
    assert (m.num_layers, m.hidden_size, m.num_heads, m.num_kv_heads, m.head_dim) == (16, 2048, 32, 2, 64)
    assert (m.ffn_size, m.vocab_size, m.max_sequence_length, m.tied_embeddings) == (8192, 128256, 8192, True)
    assert (m.rope_theta, m.rope_scaling, m.norm_eps, m.init_std) == (500000.0, None, 1e-5, 0.02)
    a = recipe.attention
    assert (a.block_size, a.block_count, a.window, a.alignment_weight, a.sparse_probability) == (16, 16, 128, 10, 0.5)
    o = recipe.optimizer
    assert (o.lr, o.beta1, o.beta2, o.weight_decay, o.clip_grad_norm) == (1e-3, 0.9, 0.95, 0.1, 1.0)
    s = recipe.schedule
    assert (s.kind, s.warmup_fraction, s.min_lr_ratio) == ("cosine", 0.01, 0.0)
    assert (recipe.train.precision, recipe.train.sequence_length) == ("bf16", 8192)


@pytest.mark.parametrize(
    ("name", "tokens"), [*((f"{k}-1b", 100e9) for k in ("full", "moba", "nsa", "ssa")), ("ssa-300m", 50e9)]
)
def test_a_recipe_trains_on_the_papers_number_of_tokens(name, tokens):
    train = load_recipe(name).train
    assert train.steps * train.global_batch_rows * train.sequence_length == pytest.approx(tokens, rel=1e-3)


def test_the_four_1b_recipes_differ_in_their_attention_only():
    reference = load_recipe("ssa-1b").model_dump()
    for kind in ("full", "moba", "nsa"):
        changed = {line.split(":")[0] for line in differences(reference, load_recipe(f"{kind}-1b").model_dump())}
        assert changed <= {"name", "attention.kind", "train.recompute"}


def test_a_dumped_recipe_resolves_to_itself():
    recipe = load_recipe("demo", ["model.rope_scaling.factor=8", "data.path=/data/x"])
    assert resolve(yaml.safe_load(dump_recipe(recipe)), origin="dump") == recipe


# ------------------------------------------------------------------------------------------------------- overrides
def test_overrides_change_their_field_and_nothing_else(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    overrides = ["train.steps=7", "optimizer.lr=1e-4", "parallel.sequence=true", "data.path=some/folder", "name=other"]
    changed = differences(tiny().model_dump(), load_recipe(str(path), overrides).model_dump())
    assert changed == [
        "data.path: None -> 'some/folder'",
        "name: 'tiny' -> 'other'",
        "optimizer.lr: 0.001 -> 0.0001",
        "parallel.sequence: False -> True",
        "train.steps: 20 -> 7",
    ]


def test_the_old_name_of_the_stall_timeout_is_still_read():
    assert tiny(data__patience=7.0) == tiny(data__stall_timeout=7.0)
    assert load_recipe("demo", ["data.patience=7"]).data.stall_timeout == 7
    with raises(ConfigError, "stall-timeout-twice", "stall_timeout", "patience"):
        tiny(data__patience=7.0, data__stall_timeout=8.0)


def test_the_last_of_two_overrides_of_a_field_counts():
    assert load_recipe("demo", ["train.steps=7", "train.steps=8"]).train.steps == 8


def test_a_recipe_is_read_from_a_file_by_its_path(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TINY))
    assert load_recipe(str(path)) == tiny()


# -------------------------------------------------------------------------------------------------------- mistakes
REFUSED = {
    "unknown section": (["trian.steps=1"], "unknown-key", ["trian", "'train'"]),
    "mistyped key": (["train.stepps=1"], "unknown-key", ["train.stepps", "'steps'"]),
    "unknown key like nothing": (
        ["zero.qqq=1"],
        "unknown-key",
        ["zero.qqq", "offload_optimizer, reduce_bucket_mb, stage"],
    ),
    "mistyped key two levels down": (
        ["model.rope_scaling.facto=2"],
        "unknown-key",
        ["model.rope_scaling.facto", "'factor'"],
    ),
    "text for a number": (["train.steps=many"], "int-parsing", ["train.steps", "'many'"]),
    "no steps": (["train.steps=0"], "greater-than-equal", ["train.steps", 1, "got 0"]),
    "a stage that is true": (["zero.stage=true"], "number-not-truth-value", ["zero.stage", True]),
    "an optional number that is true": (
        ["data.cache_limit=true"],
        "number-not-truth-value",
        ["data.cache_limit", True],
    ),
    "half a step": (["train.steps=1.5"], "int-from-float", ["train.steps", 1.5]),
    "unknown attention": (
        ["attention.kind=linear"],
        "unknown-variant-name",
        ["attention.kind", "full, moba, nsa, ssa", "'linear'"],
    ),
    "a probability above 1": (
        ["attention.sparse_probability=1.5"],
        "less-than-equal",
        ["attention.sparse_probability", 1.5],
    ),
    "negative learning rate": (["optimizer.lr=-1e-3"], "greater-than", ["optimizer.lr", -0.001]),
    "infinite learning rate": (["optimizer.lr=.inf"], "finite-number", ["optimizer.lr", "inf"]),
    "learning rate that is not a number": (["optimizer.lr=.nan"], "finite-number", ["optimizer.lr", "nan"]),
    "groups that do not divide the heads": (
        ["model.num_kv_heads=3"],
        "kv-heads-divide-heads",
        ["num_kv_heads=3", "num_heads=4"],
    ),
    "odd head": (["model.head_dim=31"], "head-dim-even", ["head_dim=31"]),
    "micro-batch that does not divide the batch": (
        ["train.micro_batch_rows=3", "train.global_batch_rows=8"],
        "micro-batch-divides",
        ["train.micro_batch_rows=3", "train.global_batch_rows=8"],
    ),
    "rows longer than the model": (
        ["train.sequence_length=513"],
        "row-longer-than-model",
        ["train.sequence_length=513", "model.max_sequence_length=512"],
    ),
    "RoPE frequencies the wrong way round": (
        ["model.rope_scaling.high_freq_factor=1"],
        "rope-frequencies",
        ["high_freq_factor=1.0", "low_freq_factor=1.0"],
    ),
    "a dataset and several": (["data.path=a", "data.sources.web=b"], "path-and-sources", ["path", "sources"]),
    "override without a value": (["train.steps"], "override-form", ["'train.steps'", "section.field=value"]),
    "override without a field": (["train.=1"], "override-form", ["'train.=1'", "section.field=value"]),
    "a value where a section should be": (["name.x=1"], "override-not-a-section", ["'name.x=1'", "'name'"]),
    "a value that is not YAML": (["train.steps=[1"], "override-not-yaml", ["'train.steps=[1'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_mistake_is_refused_with_field_value_and_remedy(case):
    overrides, id, mentions = REFUSED[case]
    with raises(ConfigError, id, *mentions) as refused:
        load_recipe("demo", overrides)
    assert refused.value.remedy
    assert refused.value.exit_code == 2


def test_every_mistake_of_a_recipe_is_reported_at_once_with_its_own_id():
    fields = ("train.steps", "model.hiden_size", "optimizer.lr")
    ids = ("[unknown-key]", "[greater-than]", "[greater-than-equal]")
    with raises(ConfigError, "unknown-key", *fields, *ids):
        load_recipe("demo", ["train.steps=0", "model.hiden_size=3", "optimizer.lr=0"])


def test_a_required_field_that_is_missing_is_named():
    values = {**TINY, "train": {k: v for k, v in TINY["train"].items() if k != "steps"}}
    with raises(ConfigError, "required-field", "train.steps"):
        resolve(values, origin="test")


def test_an_unknown_recipe_is_refused_with_the_nearest_name_and_all_names():
    names = "demo, full-1b, moba-1b, nsa-1b, ssa-1b, ssa-300m"
    with raises(ConfigError, "no-such-recipe", "'ssa1b'", "'ssa-1b'", names):
        load_recipe("ssa1b")


@pytest.mark.parametrize(
    ("content", "id"),
    [
        (None, "recipe-unreadable"),
        ("train: [", "recipe-not-yaml"),
        ("- a list", "recipe-without-sections"),
        ("", "recipe-without-sections"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(tmp_path, content, id):
    path = tmp_path / "mine.yaml"
    if content is not None:
        path.write_text(content)
    with raises(ConfigError, id, path):
        load_recipe(str(path))


def test_a_recipe_cannot_be_changed_once_resolved():
    with pytest.raises(ValueError, match="frozen"):
        tiny().train.steps = 3


# ---------------------------------------------------------------------------------------------------------- digest
SAME_RUN = {
    "topology": {"parallel__tensor": 2, "parallel__sequence": True},
    "ZeRO": {"zero__stage": 2, "zero__offload_optimizer": True, "zero__reduce_bucket_mb": 7},
    "recompute": {"train__recompute": "full"},
    "backend": {"attention__backend": "torch"},
    "path": {"data__path": "elsewhere", "data__read_ahead": 0},
    "name": {"name": "other"},
    "intervals": {
        "checkpoint__interval": 3,
        "checkpoint__keep": 9,
        "checkpoint__asynchronous": False,
        "logging__interval": 5,
        "train__eval_interval": 2,
    },
}
ANOTHER_RUN = {
    "model": {"model__hidden_size": 40},
    "attention": {"attention__block_count": 2},
    "alignment": {"attention__alignment_weight": 9.0},
    "seed": {"train__seed": 1},
    "learning rate": {"optimizer__lr": 2e-3},
    "schedule": {"schedule__kind": "wsd"},
    "steps": {"train__steps": 21},
    "batch": {"train__global_batch_rows": 8},
    "micro-batch": {"train__micro_batch_rows": 2},
    "row length": {"train__sequence_length": 34},
    "precision": {"train__precision": "bf16"},
    "order": {"data__shuffle": False},
}


@pytest.mark.parametrize("case", SAME_RUN)
def test_the_digest_ignores_what_may_change_between_restarts(case):
    assert tiny(**SAME_RUN[case]) != tiny()
    assert digest(tiny(**SAME_RUN[case])) == digest(tiny())


@pytest.mark.parametrize("case", ANOTHER_RUN)
def test_the_digest_changes_with_what_makes_another_run(case):
    assert digest(tiny(**ANOTHER_RUN[case])) != digest(tiny())


def test_the_digest_of_a_recipe_written_before_a_field_was_added_stays_what_its_checkpoints_record():
    assert (
        digest(tiny()) == "7d42a6e9a93fb1db80b6d614d7093f64b67fc1e1b8a3f71ffebc10451e05b5ed"
    )  # computed by release 0.1.0


def test_differences_names_leaves_with_old_and_new_value():
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"c": 2, "d": None}, "e": "x"}) == [
        "a: 1 -> None",
        "b.d: 3 -> None",
        "e: None -> 'x'",
    ]
