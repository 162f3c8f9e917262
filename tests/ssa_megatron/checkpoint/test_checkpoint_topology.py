"""A checkpoint does not know what wrote it: every place of the worker's table loads what others saved while they trained."""

import json

import pytest

from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.parallel import topology
from tests.launch import run
from tests.workers.checkpoint_exchange import CHAIN, LOADS, NAMES, PLACES, PRECISIONS, recipe_of, visit

pytestmark = pytest.mark.timeout(1500)  # the first test waits for every launch
KINDS = ("weight", "master", "exp_avg", "exp_avg_sq")
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}
WORKER = "tests.workers.checkpoint_exchange"


def _slow(*places: str):
    """Four and eight processes on two cores, and launches of two once more for what they wrote, take minutes."""
    large = any(place not in PLACES or PLACES[place][0] > 2 for place in places)
    return pytest.param(*places, marks=pytest.mark.slow if large else ())


def _asked_for(request) -> set:
    """Values of the parameters of this module's selected tests."""
    parameters = [getattr(item, "callspec", None) for item in request.session.items if item.module is request.module]
    return {value for found in parameters if found for value in found.params.values()}


@pytest.fixture(scope="module")
def exchange(request, alone, tmp_path_factory):
    """(folder of all run folders, {place or load: [loss, gradient norm] of step 4}); as many processes as the tests ask for."""
    root = tmp_path_factory.mktemp("exchange")
    results = {}
    visit(root, "one", alone, results)
    larger = {PLACES[place][0] for place in _asked_for(request) if place in PLACES} - {1}
    for processes in (*sorted(larger), *sorted(larger)[:-1]):
        run(processes, WORKER, str(root), timeout=900)
    visit(root, "one", alone, results)
    if 8 in larger:  # the end of the chain
        run(2, WORKER, str(root), timeout=900)
    for processes in larger:
        results |= json.loads((root / f"{processes}.json").read_text())
    return root, results


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("source", "place"), [_slow(*load) for load in LOADS])
def test_masters_moments_and_weights_are_equal_after_a_load_elsewhere(exchange, precision, source, place):
    root, _ = exchange
    original = Checkpoint.open(root / f"{precision}-{source}")
    loaded = Checkpoint.open(root / f"{precision}-{source}-to-{place}")
    assert loaded.names()
    assert sorted(loaded.names()) == sorted(original.names())
    assert loaded.digest(KINDS) == original.digest(KINDS)
    assert loaded.content.state == original.content.state == {"applied_steps": 3}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("source", "place"), [_slow(*load) for load in LOADS])
def test_the_step_after_a_load_is_the_one_that_would_have_followed(exchange, precision, source, place):
    _, results = exchange
    expected = results[f"{precision}-{source}"]
    assert results[f"{precision}-{source}-to-{place}"] == pytest.approx(expected, rel=TOLERANCE[precision])


def test_the_chain_is_the_one_that_is_promised_and_each_link_begins_where_the_one_before_ended():
    """TP 2 x PP 2 x DP 2 with ZeRO-1 -> DP 2 with ZeRO-3 -> one process -> CP 2; its links are among LOADS, tested above."""
    assert [place for _, place in CHAIN] == ["dp2 ZeRO-3", "one", "cp2"]
    assert [source for source, _ in CHAIN[1:]] == [f"{source}-to-{place}" for source, place in CHAIN[:-1]]
    assert set(CHAIN) <= set(LOADS)
    recipe = recipe_of("fp32", CHAIN[0][0])
    assert (recipe.parallel.tensor, recipe.parallel.pipeline, recipe.zero.stage) == (2, 2, 1)
    assert topology.data_parallel_size(recipe, PLACES[CHAIN[0][0]][0]) == 2


@pytest.mark.parametrize("place", [_slow(place) for place in NAMES[1:]])
def test_three_clipped_steps_lead_to_the_same_masters_everywhere(exchange, place):
    root, results = exchange
    assert results["fp32-one"][1] > recipe_of("fp32", "one").optimizer.clip_grad_norm, "clipping is not active"
    reference, found = Checkpoint.open(root / "fp32-one"), Checkpoint.open(root / f"fp32-{place}")
    for name in reference.names():
        mine, expected = found.tensor(name, "master"), reference.tensor(name, "master")
        assert float((mine - expected).norm() / expected.norm()) <= 1e-5, name


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("place", [_slow(place) for place in NAMES])
def test_every_rank_that_owns_something_wrote_its_own_file(exchange, precision, place):
    root, _ = exchange
    files = sorted(Checkpoint.open(root / f"{precision}-{place}").content.files)
    assert files == [f"rank-{rank:05d}-000.safetensors" for rank in range(PLACES[place][0])]


def test_the_digest_tells_different_contents_apart(exchange):
    root, _ = exchange
    checkpoint = Checkpoint.open(root / "fp32-one")
    digests = {checkpoint.digest((kind,)) for kind in ("master", "exp_avg", "exp_avg_sq")}
    digests |= {Checkpoint.open(root / "bf16-one").digest(("master",))}
    assert len(digests) == 4
