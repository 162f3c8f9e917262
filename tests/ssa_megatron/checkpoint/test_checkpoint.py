"""Checkpoints: what is written, that it comes back bit for bit, and that nothing damaged is ever loaded."""

import errno
import hashlib
import json
import math
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ssa_megatron.checkpoint import writer
from ssa_megatron.checkpoint.manifest import Manifest, committed
from ssa_megatron.checkpoint.reader import Checkpoint, _fragment_values, load_into, newest_valid
from ssa_megatron.checkpoint.tensor_file import write_safetensors
from ssa_megatron.checkpoint.writer import prune, save_checkpoint
from ssa_megatron.config import digest
from ssa_megatron.errors import CheckpointError
from ssa_megatron.model.shapes import global_shapes
from tests.errors import raises
from tests.ssa_megatron.support import build, take_steps, tiny

SHARE = "rank-00000-000.safetensors"


def save(run: Path, trained, parallel, step: int) -> str | None:
    _, optimizer, recipe = trained
    state = {"step": step, "data": {"row": 4 * step}}
    return save_checkpoint(run, optimizer, recipe, parallel, step=step, state=state, tokenizer_fingerprint="f" * 64)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def trained(request, alone):
    """(model, optimizer, recipe) after three steps."""
    recipe = tiny(train__precision=request.param)
    model, optimizer = build(recipe, alone)
    assert all(result.applied for result in take_steps(model, optimizer, recipe, alone, 0, 3))
    return model, optimizer, recipe


@pytest.fixture(scope="module")
def written(trained, alone, tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 2 and 3; never written to."""
    run = tmp_path_factory.mktemp("run")
    assert save(run, trained, alone, 2) is None
    assert save(run, trained, alone, 3) is None
    return run


@pytest.fixture
def run(written, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def copy_of_state(optimizer) -> list[list[torch.Tensor]]:
    return [[t.clone() for t in (f.working, *f.stored.values())] for f in optimizer.fragments()]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for one, two in zip(a, b, strict=True) for x, y in zip(one, two, strict=True))


def entries(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------------------ form
def test_a_save_leaves_the_files_the_readme_names_and_no_other(written):
    assert entries(written) == ["latest", "step-00000002", "step-00000003"]
    assert (written / "checkpoints" / "latest").read_text() == "step-00000003\n"
    files = sorted(path.name for path in (written / "checkpoints" / "step-00000003").iterdir())
    assert files == ["manifest.json", SHARE]


def test_the_manifest_says_step_state_recipe_and_every_tensor(written, trained):
    recipe = trained[2]
    content = json.loads((written / "checkpoints" / "step-00000003" / "manifest.json").read_text())
    assert (content["format"], content["step"], content["state"]) == (1, 3, {"step": 3, "data": {"row": 12}})
    assert (content["recipe"], content["recipe_digest"]) == (recipe.model_dump(mode="json"), digest(recipe))
    assert content["tokenizer_fingerprint"] == "f" * 64
    kinds = {"master", "exp_avg", "exp_avg_sq"} | ({"weight"} if recipe.train.precision == "bf16" else set())
    shapes = {}
    for name, found in content["tensors"].items():
        assert found.keys() == kinds
        shapes[name] = tuple(found["master"]["shape"])
        assert [found[kind]["dtype"] for kind in sorted(kinds - {"weight"})] == ["float32"] * 3
    assert shapes == global_shapes(recipe)


def test_keys_are_kind_and_global_name_and_piece(written):
    with safe_open(written / "checkpoints" / "step-00000003" / SHARE, framework="pt") as file:
        keys = set(file.keys())
    assert "master/model.embed_tokens.weight#0" in keys
    for key in keys:
        kind, _, rest = key.partition("/")
        name, _, piece = rest.partition("#")
        assert kind in ("weight", "master", "exp_avg", "exp_avg_sq")
        assert name in global_shapes(tiny())
        assert piece.isdigit()


def test_the_safetensors_library_reads_what_write_safetensors_wrote(tmp_path):
    tensors = {
        "a/b#0": torch.randn(7),
        "a/b#1": torch.tensor([1.5, -2.0, torch.inf]).bfloat16(),
        "empty": torch.empty(0),
        "a view": torch.arange(10.0)[3:8],
    }
    stored = write_safetensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    content = (tmp_path / "x.safetensors").read_bytes()
    assert stored.bytes == len(content)
    assert stored.sha256 == hashlib.sha256(content).hexdigest()


# -------------------------------------------------------------------------------------------------------- round trip
def test_loading_restores_every_bit_of_masters_moments_weights_and_adams_step(written, trained, alone):
    model, optimizer, recipe = trained
    other_model, other = build(recipe, alone)
    assert not equal(copy_of_state(other), copy_of_state(optimizer))
    load_into(Checkpoint.open(written), other, applied_steps=3)
    assert equal(copy_of_state(other), copy_of_state(optimizer))
    assert all(torch.equal(a, b) for a, b in zip(other_model.parameters(), model.parameters(), strict=True))
    assert other.applied_steps == optimizer.applied_steps == 3


def test_training_goes_on_after_a_load_as_if_nothing_had_happened(alone, tmp_path):
    for precision in ("fp32", "bf16"):
        recipe = tiny(train__precision=precision)
        model, optimizer = build(recipe, alone)
        take_steps(model, optimizer, recipe, alone, 0, 3)
        run = tmp_path / precision
        assert save(run, (model, optimizer, recipe), alone, 3) is None
        expected = take_steps(model, optimizer, recipe, alone, 3, 6)
        other_model, other = build(recipe, alone)
        load_into(Checkpoint.open(run), other, applied_steps=3)
        assert take_steps(other_model, other, recipe, alone, 3, 6) == expected
        assert equal(copy_of_state(other), copy_of_state(optimizer))


def test_whole_tensors_are_read_by_global_name(written, trained):
    model, _, recipe = trained
    checkpoint = Checkpoint.open(written)
    embedding = model.chunks[0].embedding.word_embeddings.weight
    assert torch.equal(checkpoint.tensor("model.embed_tokens.weight"), embedding)
    assert checkpoint.tensor("model.embed_tokens.weight").dtype == embedding.dtype
    assert checkpoint.tensor("model.embed_tokens.weight", "master").dtype == torch.float32
    part = checkpoint.rectangle("model.embed_tokens.weight", "master", (5, 3), (4, 11))
    assert torch.equal(part, checkpoint.tensor("model.embed_tokens.weight", "master")[5:9, 3:14])
    assert checkpoint.recipe == recipe.model_dump(mode="json")


def test_a_tensor_that_is_not_there_is_named(written):
    with raises(CheckpointError, "no-such-tensor", "step-00000003", "model.nothing"):
        Checkpoint.open(written).tensor("model.nothing")


def test_open_finds_the_newest_the_asked_and_the_named_step(written):
    assert Checkpoint.open(written).content.step == 3
    assert Checkpoint.open(written, step=2).content.step == 2
    assert Checkpoint.open(written / "checkpoints" / "step-00000002").content.step == 2
    with raises(CheckpointError, "no-checkpoint-of-step", 7, "3, 2"):
        Checkpoint.open(written, step=7)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with raises(CheckpointError, "no-committed-checkpoint", tmp_path):
        Checkpoint.open(tmp_path)


# ------------------------------------------------------------------------------------------------------------ damage
def _truncate(to):
    def damage(folder: Path) -> Path:
        path = folder / SHARE
        os.truncate(path, to(path.stat().st_size))
        return path

    return damage


def _flip(file: str, at):
    def damage(folder: Path) -> Path:
        path = folder / file
        content = bytearray(path.read_bytes())
        content[at(len(content))] ^= 1
        path.write_bytes(content)
        return path

    return damage


def _remove(file: str):
    def damage(folder: Path) -> Path:
        (folder / file).unlink()
        return folder / file

    return damage


def _manifest(text):
    def damage(folder: Path) -> Path:
        path = folder / "manifest.json"
        path.write_text(text(path.read_text()))
        return path

    return damage


def _without(entry: str):
    def change(text: str) -> str:
        values = json.loads(text)
        del values[entry]
        return json.dumps(values)

    return change


DAMAGE = {
    "share empty": (_truncate(lambda size: 0), "0 bytes, the manifest says"),
    "share of one byte": (_truncate(lambda size: 1), "1 bytes, the manifest says"),
    "half a share": (_truncate(lambda size: size // 2), "bytes, the manifest says"),
    "a share's last byte gone": (_truncate(lambda size: size - 1), "bytes, the manifest says"),
    "a share one byte longer": (_truncate(lambda size: size + 1), "bytes, the manifest says"),
    "a bit flipped in the data": (_flip(SHARE, lambda size: size * 2 // 3), "sha256"),
    "a bit flipped in the header": (_flip(SHARE, lambda size: 20), "sha256"),
    "share missing": (_remove(SHARE), "No such file"),
    "manifest missing": (_remove("manifest.json"), "not a readable manifest"),
    "manifest empty": (_manifest(lambda text: ""), "not a readable manifest"),
    "manifest cut": (_manifest(lambda text: text[: len(text) // 2]), "not a readable manifest"),
    "manifest not an object": (_manifest(lambda text: "[]"), "not a readable manifest"),
    "manifest without its sha256": (_manifest(_without("sha256")), "not a readable manifest"),
    "manifest without its files": (_manifest(_without("files")), "altered since it was written"),
    "a digit of the data position changed": (
        _manifest(lambda text: text.replace('"row": 12', '"row": 13')),
        "altered since it was written",
    ),
    "a digit of the step changed": (
        _manifest(lambda text: text.replace('"step": 3', '"step": 7')),
        "altered since it was written",
    ),
    "manifest of another format": (
        _manifest(lambda text: text.replace('"format": 1', '"format": 2')),
        "another format version",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused_by_the_files_name_and_the_older_checkpoint_is_taken(run, alone, case):
    damage, says = DAMAGE[case]
    path = damage(run / "checkpoints" / "step-00000003")
    with pytest.raises(CheckpointError) as refused:
        Checkpoint.open(run)
    assert str(path) in str(refused.value)
    assert says in str(refused.value)
    checkpoint, [line] = newest_valid(run, alone)
    assert checkpoint.content.step == 2
    assert line.startswith("checkpoint step-00000003 is not used: ")
    assert says in line


def test_intact_checkpoints_are_not_rejected(written, alone):
    checkpoint, rejected = newest_valid(written, alone)
    assert (checkpoint.content.step, rejected) == (3, [])


def test_a_run_without_checkpoints_starts_from_scratch(tmp_path, alone):
    assert newest_valid(tmp_path, alone) == (None, [])


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_scratch(run, alone):
    for step in (2, 3):
        _flip(SHARE, lambda size: size - 1)(run / "checkpoints" / f"step-{step:08d}")
    with raises(
        CheckpointError, "no-intact-checkpoint", "step-00000002", "step-00000003", "sha256", run / "checkpoints"
    ):
        newest_valid(run, alone)


def test_latest_pointing_nowhere_does_not_matter(run, alone):
    (run / "checkpoints" / "latest").write_text("step-00000099\n")
    assert newest_valid(run, alone)[0].content.step == 3


def test_a_checkpoint_of_a_wider_model_is_not_poured_into_a_narrower_one(written, alone):
    _, other = build(tiny(model__tied_embeddings=False), alone)
    with raises(CheckpointError, "no-such-tensor", "lm_head.weight"):
        load_into(Checkpoint.open(written), other, applied_steps=3)


def test_pieces_that_do_not_cover_a_tensor_are_noticed(run):
    folder = run / "checkpoints" / "step-00000003"
    manifest = Manifest.read(folder)
    manifest.tensors["model.norm.weight"]["master"]["pieces"].clear()
    (folder / "manifest.json").write_text(replace(manifest).to_json())
    with raises(CheckpointError, "tensor-not-covered", "master model.norm.weight", 0, 32):
        Checkpoint.open(run).tensor("model.norm.weight", "master")


def _edited(run: Path, change) -> Checkpoint:
    """The newest checkpoint after `change` of its manifest's tensors, which then still matches its own sha256."""
    folder = run / "checkpoints" / "step-00000003"
    manifest = Manifest.read(folder)
    change(manifest.tensors)
    (folder / "manifest.json").write_text(manifest.to_json())
    return Checkpoint.open(run)


def _twice_the_first_half(tensors) -> None:
    pieces = tensors["model.norm.weight"]["master"]["pieces"]
    pieces[0]["range"] = [0, 16]
    pieces.append(dict(pieces[0]))  # as many elements as the tensor has


def _of_an_unlisted_file(tensors) -> None:
    tensors["model.norm.weight"]["master"]["pieces"][0]["file"] = "../step-00000002/" + SHARE


def _of_another_length(tensors) -> None:
    pieces = tensors["model.norm.weight"]["master"]["pieces"]
    pieces[0]["key"] = "master/model.embed_tokens.weight#0"


@pytest.mark.parametrize(
    ("change", "id", "mentions"),
    [
        (_twice_the_first_half, "tensor-shape-differs", [16]),
        (_of_an_unlisted_file, "tensor-file-not-listed", [SHARE]),
        (_of_another_length, "tensor-shape-differs", [1696, 32]),
    ],
)
def test_a_manifest_that_contradicts_its_files_is_refused_not_read_as_whatever_memory_held(run, change, id, mentions):
    with raises(CheckpointError, id, *mentions):
        _edited(run, change).tensor("model.norm.weight", "master")


def test_pieces_that_overlap_and_leave_a_gap_are_noticed_although_their_elements_add_up(run):
    checkpoint = Checkpoint.open(run)
    pieces = [{"range": [0, 16]}, {"range": [0, 16]}]
    checkpoint._read = lambda piece, first, last: torch.zeros(last - first)
    with raises(CheckpointError, "tensor-incomplete", "16..32"):
        checkpoint._fill(torch.empty(32), 0, pieces, "master x")


def test_a_rank_reads_the_rows_it_keeps_and_not_the_whole_tensor(written, trained, monkeypatch):
    """With many data-parallel ranks, each of which owns a small range, a load would else read the model once a rank."""
    _, optimizer, _ = trained
    checkpoint, read = Checkpoint.open(written), []
    real = Checkpoint._read

    def counted(self, piece, first, last):
        read.append(last - first)
        return real(self, piece, first, last)

    monkeypatch.setattr(Checkpoint, "_read", counted)
    for fragment in optimizer.fragments():
        whole = torch.cat([fragment.master])
        for first in range(0, fragment.numel, 700):
            share = replace(fragment, start=fragment.start + first, numel=min(700, fragment.numel - first))
            read.clear()
            found = list(_fragment_values(checkpoint, share, "master"))
            for place, values in found:
                assert torch.equal(values, whole[first : first + share.numel][place])
            width = max(math.prod(block.shape[1:]) for block in fragment.named.slabs)
            assert sum(read) < share.numel + 2 * width * len(found)


# ------------------------------------------------------------------------------------------------------ failed saves
def test_a_full_disk_is_reported_and_leaves_everything_as_it_was(run, trained, alone):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # smaller than the share: write() fails half-way
    try:
        problem = save(run, trained, alone, 4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert problem.startswith("not written: rank 0: ")
    assert "File too large" in problem
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert entries(run) == ["latest", "step-00000002", "step-00000003"]
    assert save(run, trained, alone, 4) is None, "once there is room again, saving works"
    assert Checkpoint.open(run).content.step == 4


def test_a_disk_that_is_full_at_the_manifest_leaves_everything_as_it_was(run, trained, alone, monkeypatch):
    def full(path, text):
        path.write_text(text[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_durably", full)
        assert "No space left on device" in save(run, trained, alone, 4)
    assert entries(run) == ["latest", "step-00000002", "step-00000003"]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert newest_valid(run, alone)[0].content.step == 3


def test_a_failed_rename_leaves_everything_as_it_was(run, trained, alone, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        assert "Input/output error" in save(run, trained, alone, 4)
    assert entries(run) == ["latest", "step-00000002", "step-00000003"]
    assert newest_valid(run, alone)[0].content.step == 3


def test_a_checkpoint_folder_that_cannot_be_made_is_reported(tmp_path, trained, alone):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    assert "Not a directory" in save(tmp_path, trained, alone, 1)


def test_what_a_killed_save_left_is_not_a_checkpoint_and_the_next_save_replaces_it(run, trained, alone):
    left = run / "checkpoints" / ".tmp-step-00000004"
    shutil.copytree(run / "checkpoints" / "step-00000003", left)
    (left / "stray").write_text("x")
    assert newest_valid(run, alone)[0].content.step == 3
    assert save(run, trained, alone, 4) is None
    assert not left.exists()
    assert not (run / "checkpoints" / "step-00000004" / "stray").exists()


def test_a_step_whose_checkpoint_was_damaged_is_saved_anew(run, trained, alone):
    _flip(SHARE, lambda size: size - 1)(run / "checkpoints" / "step-00000003")
    assert save(run, trained, alone, 3) is None
    checkpoint, rejected = newest_valid(run, alone)
    assert (checkpoint.content.step, rejected) == (3, [])


# ----------------------------------------------------------------------------------------------------------- pruning
@pytest.mark.parametrize("keep", [1, 2, 5])
def test_prune_keeps_the_newest_and_clears_what_a_killed_save_left(run, trained, alone, keep):
    for step in (4, 100_000_000):
        assert save(run, trained, alone, step) is None
    (run / "checkpoints" / ".tmp-step-00000009").mkdir()
    prune(run, keep, newest=100_000_000)
    steps = [100_000_000, 4, 3, 2][:keep]
    assert [int(path.name[5:]) for path in committed(run)] == steps
    assert entries(run) == sorted(["latest", *(f"step-{step:08d}" for step in steps)])


def test_a_pointer_that_cannot_be_written_is_told_and_the_checkpoint_counts(run, trained, alone, monkeypatch):
    def refuse(final):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writer, "point_latest_at", refuse)
    assert "committed, but `latest` could not be pointed at it" in save(run, trained, alone, 4)
    assert newest_valid(run, alone)[0].content.step == 4
    prune(run, 1, newest=99)
    assert entries(run) == ["latest", "step-00000004"]


def test_pruning_after_a_fall_back_does_not_keep_rejected_later_checkpoints_instead_of_good_ones(run, trained, alone):
    assert save(run, trained, alone, 6) is None
    (run / "checkpoints" / "step-00000006" / SHARE).unlink()  # rejected: the run resumes from step 3 and saves step 4
    assert save(run, trained, alone, 4) is None
    prune(run, 1, newest=4)
    assert [path.name for path in committed(run)] == ["step-00000006", "step-00000004"]
    assert newest_valid(run, alone)[0].content.step == 4


def test_a_prune_that_cannot_remove_does_not_end_training(run, monkeypatch):
    def refuse(self, target):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        prune(run, 1, newest=99)
    assert [path.name for path in committed(run)] == ["step-00000003", "step-00000002"]


def test_a_prune_that_is_killed_leaves_no_half_folder_that_looks_committed(run, alone, monkeypatch):
    def killed(path, **_):
        (Path(path) / SHARE).unlink()  # the first file is gone, then the process is
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prune(run, 1, newest=99)
    assert [path.name for path in committed(run)] == ["step-00000003"]
    prune(run, 1, newest=99)
    assert entries(run) == ["latest", "step-00000003"]
