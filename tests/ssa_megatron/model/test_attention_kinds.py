"""A new attention kind is one class: it trains, resumes, plans, reports and exports. An unknown kind raises where it is read."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ssa_kernels
import ssa_megatron
from ssa_kernels import BlockSpec
from ssa_megatron.checkpoint.reader import Checkpoint, load_into
from ssa_megatron.checkpoint.writer import save_checkpoint
from ssa_megatron.config import digest, dump_recipe
from ssa_megatron.config.variants import KINDS
from ssa_megatron.errors import CheckpointError, ConfigError
from ssa_megatron.hf.bundle import configuration_ssa
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.decode import decodes
from ssa_megatron.hf.export import config_of, export
from ssa_megatron.hf.importing import import_folder
from ssa_megatron.model.kinds.base import AttentionKind
from ssa_megatron.model.shapes import global_shapes
from ssa_megatron.planning import hardware
from ssa_megatron.planning.memory import memory
from ssa_megatron.planning.step_time import speed
from ssa_megatron.report.report_page import write_report
from tests.errors import raises
from tests.ssa_megatron import toy_kind
from tests.ssa_megatron.hf.conftest import own_module_cache  # noqa: F401 - loading an export copies its code
from tests.ssa_megatron.support import build, take_steps, tiny


@pytest.fixture(scope="module")
def toy() -> Iterator[type[AttentionKind]]:
    with toy_kind.registered() as kind:
        yield kind


@pytest.fixture(scope="module")
def recipe(toy):
    return tiny(attention__kind=toy_kind.NAME, model__vocab_size=400)


@pytest.fixture(scope="module")
def run(recipe, alone, tokenizer, tmp_path_factory) -> Path:
    """A run folder after two steps; never written to."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    model, optimizer = build(recipe, alone)
    assert all(result.applied for result in take_steps(model, optimizer, recipe, alone, 0, 2))
    state = {"step": 2, "data": {"row": 8}}
    fingerprint = tokenizer.fingerprint
    failure = save_checkpoint(folder, optimizer, recipe, alone, step=2, state=state, tokenizer_fingerprint=fingerprint)
    assert failure is None
    shutil.copyfile(tokenizer.path, folder / "tokenizer.model")
    (folder / "config.yaml").write_text(dump_recipe(recipe))
    return folder


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    return export(run, tmp_path_factory.mktemp("toy") / "model")


def resumed(run, recipe, alone):
    """(model, optimizer) with the state of the checkpoint."""
    model, optimizer = build(recipe, alone)
    load_into(Checkpoint.open(run), optimizer, applied_steps=2)
    return model, optimizer


# ---------------------------------------------------------------------------------------------------------- a new kind
def test_a_new_kind_resumes_bit_equal(run, recipe, alone):
    expected = take_steps(*build(recipe, alone), recipe, alone, 0, 4)[2:]
    assert take_steps(*resumed(run, recipe, alone), recipe, alone, 2, 4) == expected


def test_a_new_kind_is_planned_from_its_streams(toy):
    gpu = hardware.find("h100")

    def plan(kind: str, **attention):
        fields = {f"attention__{name}": value for name, value in attention.items()}
        recipe = tiny(attention__kind=kind, model__head_dim=64, train__precision="bf16", **fields)
        return memory(recipe, 1)[0].kept, speed(recipe, 1, gpu).parts["attention"]

    (both, seconds), (full, full_seconds), (window, window_seconds) = (
        plan(toy_kind.NAME), plan("full"), plan("nsa")
    )  # fmt: skip
    assert both["full stream"] == full["full stream"]
    assert both["compressed, window"] == window["compressed, window"] // 2, "nsa has both"
    assert both["gate"] == 2 * full["gate"]
    assert full_seconds < seconds < full_seconds + window_seconds
    assert plan(toy_kind.NAME, window=32)[1] > plan(toy_kind.NAME, window=8)[1]


@torch.no_grad()
def test_a_new_kind_is_exported_as_it_trains(exported, run, recipe, alone):
    from transformers import AutoModelForCausalLM

    from ssa_megatron.model.batch import ForwardContext, SSABatch

    config = json.loads((exported / "config.json").read_text())
    assert (config["attention_kind"], config["streams"]) == (toy_kind.NAME, ["full", "window"])
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype="auto").eval()
    trainer, _ = resumed(run, recipe, alone)
    trainer.eval()
    for length in (1, 8, 33, 64):
        tokens = torch.randint(3, 400, (1, length), generator=torch.Generator().manual_seed(length))
        starts = torch.zeros(tokens.shape, dtype=torch.int32)
        batch = SSABatch.pack(tokens, starts, alone, trunk="full")
        want = trainer(tokens, None, None, packed_seq_params=ForwardContext.begin(batch, recipe))
        got = model(tokens, use_cache=False).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), length
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1}
    cached, whole = (model.generate(tokens[:, :20], use_cache=use, **options).tolist() for use in (True, False))
    assert cached == whole
    assert toy_kind.FullWindow.training in (exported / "README.md").read_text()


def test_a_new_kind_is_imported_again_and_refused_where_its_streams_differ(exported, recipe, tmp_path):
    assert import_folder(exported, tmp_path / "run").attention.kind == toy_kind.NAME
    folder = shutil.copytree(exported, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "streams": ["window", "full"]}))
    with raises(CheckpointError, "other-streams", "window, full"):
        import_folder(folder, tmp_path / "other-run")


def test_a_new_kind_has_a_report(run, toy, tmp_path):
    page = write_report(shutil.copytree(run, tmp_path / "run")).read_text()
    assert toy.title in page
    assert "alignment weight" not in page


def test_a_kind_with_a_forward_of_its_own_says_what_export_computes():
    class Own(AttentionKind):
        title, training, streams = "Own", "trained", ("full", "window")

        def forward(self, x, trunk):
            return x.q, None

    with raises(ConfigError, "kind-not-exportable", "Own"):
        Own.exported_streams()


# ------------------------------------------------------------------------------------------------------ unknown kinds
def test_an_unknown_kind_raises_wherever_it_is_first_read():
    with raises(ConfigError, "unknown-variant-name", "attention.kind", "dense"):
        tiny(attention__kind="dense")
    known = tiny()
    unknown = known.model_copy(update={"attention": known.attention.model_copy(update={"kind": "dense"})})
    for read in (global_shapes, lambda r: memory(r, 1), lambda r: speed(r, 1, hardware.find("h100"))):
        with raises(ConfigError, "unknown-variant", "attention.kind=dense"):
            read(unknown)
    with raises(CheckpointError, "recipe-not-exportable", "dense"):
        config_of(unknown.model_dump())
    with pytest.raises(ValueError, match="attention_kind='dense'"):
        SSAConfig(attention_kind="dense")


def test_a_kind_no_longer_registered_is_refused(exported, tmp_path):
    KINDS.unregister(toy_kind.NAME)
    try:
        with raises(CheckpointError, "unknown-attention-kind", toy_kind.NAME):
            import_folder(exported, tmp_path / "run")
    finally:
        KINDS.register(toy_kind.NAME)(toy_kind.FullWindow)


# ------------------------------------------------------------------------------------------------------------- owners
BUILT_IN = ("full", "moba", "nsa", "ssa")


@pytest.mark.parametrize("name", BUILT_IN)
def test_exported_files_know_the_kinds_of_this_package(name):
    kind, config = KINDS[name], SSAConfig(attention_kind=name)
    assert configuration_ssa.KINDS[name] == kind.exported_streams()
    assert (config.gates, config.inference_mode, config.aligned) == (kind.gates, kind.inference_mode, kind.aligned)
    assert "streams" not in config.to_dict(), "config.json of these kinds is as it was before there were others"
    assert decodes(config) == (len(config.gated_streams) == 1)


def test_what_a_mode_computes_for_each_gate():
    def computed(*streams: str) -> tuple[list[str], list[str]]:
        config = SSAConfig(attention_kind="other", streams=streams)
        return config.computed_streams("full"), config.computed_streams("sparse")

    assert computed("full", "window") == (["full", "window"], ["sparse", "window"])
    assert computed("sparse", "window") == (["full", "window"], ["sparse", "window"])
    assert computed("window") == (["window"], ["window"])
    assert computed("full", "sparse") == (["full", "sparse"], ["sparse", "sparse"])
    with pytest.raises(ValueError, match="streams='dense'"):
        computed("dense")
    with pytest.raises(ValueError, match="attention_kind='moba' does not have the streams"):
        SSAConfig(attention_kind="moba", streams=["window"])


def named_kinds(source: str) -> list[str]:
    """Where a source names a kind. `full` and `ssa` mean other things too, so they count only next to something named kind."""
    found = []
    for node in ast.walk(ast.parse(source)):
        compared = isinstance(node, ast.Compare | ast.Match | ast.Subscript) and "kind" in ast.unparse(node).lower()
        names = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} if compared else set()
        if isinstance(node, ast.Constant):
            names = {node.value} & {"moba", "nsa"}
        if names & set(BUILT_IN):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    "source",
    ["if a.kind == 'ssa': pass", "x = kind in ('full', 'ssa')", "KINDS['ssa']", "T = {'moba': 1}", "'nsa' != name"],
)
def test_a_name_of_a_kind_is_found(source):
    assert named_kinds(source)


def test_no_other_file_names_a_kind():
    root = Path(ssa_megatron.__file__).parent
    own = {Path(configuration_ssa.__file__), *(root / "model" / "kinds").iterdir()}
    found = {str(path): named_kinds(path.read_text()) for path in root.rglob("*.py") if path not in own}
    assert {path: lines for path, lines in found.items() if lines} == {}


# ------------------------------------------------------------------------------------------- topk="authors", as it was
def test_the_old_spelling_of_topk_is_read_everywhere():
    attention = {"kind": "moba", "block_size": 16, "block_count": 16}
    old, new = (tiny(attention={**attention, "topk": topk}) for topk in ("authors", "reference"))
    assert (old, digest(old)) == (new, digest(new))
    values = new.model_dump()
    values["attention"]["topk"] = "authors"  # a checkpoint's manifest
    assert config_of(values).topk == SSAConfig(topk="authors").topk == "reference"
    q, k = (torch.randn(1, 600, heads, 8, generator=torch.Generator().manual_seed(heads)) for heads in (4, 2))
    blocks = [ssa_kernels.select_blocks(q, k, BlockSpec(topk=topk)) for topk in ("authors", "reference", "exact")]
    assert torch.equal(blocks[0], blocks[1])
    assert not torch.equal(blocks[0], blocks[2])
