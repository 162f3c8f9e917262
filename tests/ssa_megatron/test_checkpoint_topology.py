"""A checkpoint does not know what wrote it: one process, two data-parallel and two tensor-parallel ranks load each other's."""

import json

import pytest

from ssa_megatron.checkpoint.reader import Checkpoint
from tests.launch import run
from tests.workers.checkpoint_exchange import PRECISIONS, load_and_save, train_and_save

KINDS = ("weight", "master", "exp_avg", "exp_avg_sq")
LOADS = [("one", "dp2"), ("one", "tp2"), ("dp2", "dp2"), ("dp2", "tp2"), ("tp2", "dp2"), ("dp2", "one"), ("tp2", "one")]


@pytest.fixture(scope="module")
def exchange(alone, tmp_path_factory):
    """(folder of all run folders, {load: [loss, gradient norm] of the step after it})."""
    root = tmp_path_factory.mktemp("exchange")
    for precision in PRECISIONS:
        train_and_save(root, precision, "one", alone)
    run(2, "tests.workers.checkpoint_exchange", str(root), timeout=150)
    results = json.loads((root / "results.json").read_text())
    for precision in PRECISIONS:
        for source in ("one", "dp2", "tp2"):
            results[f"{precision}-{source}-to-one"] = load_and_save(root, precision, source, "one", alone)
    return root, results


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("source", "place"), LOADS)
def test_masters_moments_and_weights_are_equal_after_a_load_elsewhere(exchange, precision, source, place):
    root, _ = exchange
    original = Checkpoint.open(root / f"{precision}-{source}")
    loaded = Checkpoint.open(root / f"{precision}-{source}-to-{place}")
    assert loaded.names()
    assert sorted(loaded.names()) == sorted(original.names())
    assert loaded.digest(KINDS) == original.digest(KINDS)
    assert loaded.content.state == original.content.state == {"applied_steps": 3}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_each_topology_wrote_its_own_files(exchange, precision):
    root, _ = exchange
    files = {
        place: sorted(Checkpoint.open(root / f"{precision}-{place}").content.files) for place in ("one", "dp2", "tp2")
    }
    two = ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert files == {"one": two[:1], "dp2": two, "tp2": two}


def test_the_digest_tells_different_contents_apart(exchange):
    root, _ = exchange
    checkpoint = Checkpoint.open(root / "fp32-one")
    digests = {checkpoint.digest((kind,)) for kind in ("master", "exp_avg", "exp_avg_sq")}
    digests |= {Checkpoint.open(root / "bf16-one").digest(("master",))}
    assert len(digests) == 4


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
@pytest.mark.parametrize("source", ["one", "dp2", "tp2"])
def test_the_step_after_a_load_is_the_same_everywhere(exchange, precision, tolerance, source):
    _, results = exchange
    reference = results[f"{precision}-{source}-to-one"]
    for place in ("dp2", "tp2"):
        if f"{precision}-{source}-to-{place}" in results:
            assert results[f"{precision}-{source}-to-{place}"] == pytest.approx(reference, rel=tolerance)
