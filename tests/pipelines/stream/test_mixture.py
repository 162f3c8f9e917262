"""Each row of a mixed run comes from a source in proportion to its weight, in order, and depends on position and seed only."""

import numpy as np
import pytest

import ssa_pipelines
from ssa_pipelines import DatasetError, DatasetMismatch, Phase
from ssa_pipelines.stream.mixture import BLOCK, Mixture, Origin
from tests.errors import raises
from tests.pipelines.support import SETTINGS, equal, stream, take

NAMES = ("code", "prose", "web")
PHASES = (Phase(0, {"web": 7, "code": 3}), Phase(100_001, {"web": 0.1, "code": 0.2, "prose": 0.7}))


def mixture(phases=PHASES, seed=1, origin=None):
    return Mixture(NAMES, phases, row_length=100, seed=seed, origin=origin)


def test_every_source_gives_its_rows_in_order_without_a_gap_across_blocks_and_phases():
    sources, rows = mixture().at(0, 3 * BLOCK)
    for source in range(3):
        assert rows[sources == source].tolist() == list(range((sources == source).sum()))


def test_every_prefix_holds_the_weights_to_within_two_rows():
    sources, _ = mixture().at(0, 3 * BLOCK)
    before, after = sources[:1001], sources[1001:]  # 100,001 tokens are 1001 rows of 100
    for phase, weights in ((before, (0.3, 0, 0.7)), (after, (0.2, 0.7, 0.1))):
        length = np.arange(1, len(phase) + 1)
        for source, weight in enumerate(weights):
            assert np.abs(np.cumsum(phase == source) - weight * length).max() < 2.001


@pytest.mark.parametrize("row", [0, 1, 1000, 1001, 1002, BLOCK + 1000, BLOCK + 1001, 2 * BLOCK])
def test_any_position_can_be_asked_for_first(row):
    sources, rows = mixture().at(0, row + 9)
    alone = mixture()
    found = alone.at(row, 9)
    assert found[0].tolist() == sources[row:].tolist()
    assert found[1].tolist() == rows[row:].tolist()
    assert alone.seen(row).tolist() == np.bincount(sources[:row], minlength=3).tolist()


def test_the_seed_decides_where_each_source_comes_but_not_how_often():
    a, b, c = (mixture(seed=seed).at(0, 1000)[0] for seed in (1, 1, 2))
    assert a.tolist() == b.tolist()
    assert a.tolist() != c.tolist()
    assert np.abs(np.bincount(a, minlength=3) - np.bincount(c, minlength=3)).max() < 3


def test_the_sources_of_a_mixture_are_the_same_as_in_earlier_releases():
    """Pinned: runs in progress depend on it."""
    assert "".join(map(str, mixture().at(990, 40)[0])) == PINNED


PINNED = "2202202202211100111211120110111121101110"


def test_a_mixture_that_follows_another_continues_with_unseen_rows():
    later = mixture(origin=Origin(500, (150, 0, 350)))
    sources, rows = later.at(500, 2000)
    for source, first in enumerate((150, 0, 350)):
        own = rows[sources == source]
        assert own.tolist() == list(range(first, first + len(own)))
    assert later.seen(500).tolist() == [150, 0, 350]


@pytest.mark.parametrize(
    ("phases", "expected"),
    [
        ([], ("first-phase",)),
        ([Phase(5, {"web": 1})], ("first-phase",)),
        ([Phase(0, {"web": 1}), Phase(9, {"web": 1}), Phase(9, {"code": 1})], ("phase-order", 9)),
        ([Phase(0, {"web": 1, "wbe": 1})], ("weight-of-unknown-source", "wbe")),
        ([Phase(0, {"web": 0.0})], ("impossible-weights",)),
        ([Phase(0, {"web": 1, "code": float("nan")})], ("impossible-weights",)),
        ([Phase(0, {"web": 1, "code": float("inf")})], ("impossible-weights",)),
        ([Phase(0, {})], ("impossible-weights",)),
        ([Phase(0, {"web": 1}), Phase(9, {"code": 1})], ("source-without-weight", "prose")),
        ([Phase(0, {"web": 1, "code": -1})], ("impossible-weights",)),
        ([Phase(0, {"web": 1, "code": 1e-6})], ("weight-too-small", "1e-06", "code", "1/65536")),
    ],
)
def test_impossible_weights_are_refused(phases, expected):
    with raises(DatasetError, *expected):
        mixture(phases)


@pytest.fixture(scope="module")
def sources(documents, tokenizer, tmp_path_factory):
    """Three datasets of different sizes, and one made with another row length."""
    folder = tmp_path_factory.mktemp("sources")
    for name, texts in (("code", documents[:30]), ("prose", documents[30:60]), ("web", documents[60:])):
        ssa_pipelines.prepare(iter(texts), tokenizer, folder / name, **SETTINGS)
    ssa_pipelines.prepare(iter(documents), tokenizer, folder / "other", **{**SETTINGS, "row_length": 78})
    return {name: folder / name for name in ("code", "prose", "web", "other")}


def three(sources):
    return {name: sources[name] for name in NAMES}


WEIGHTS = [Phase(0, {"web": 0.5, "code": 0.5}), Phase(40 * 77, {"web": 0.2, "prose": 0.8})]


def test_a_mixed_stream_is_the_rows_of_its_sources_in_their_own_orders(sources):
    rows = stream(three(sources), phases=WEIGHTS, micro=1, batch=1)
    alone = {name: stream(sources[name], micro=1, batch=1) for name in NAMES}
    for origin in rows.row_origins(0, 200):
        assert equal([next(rows)], [next(alone[origin.source])])
    names = [origin.source for origin in rows.row_origins(0, 200)]
    assert set(names[:40]) == {"web", "code"}
    assert names[40:].count("prose") == pytest.approx(0.8 * 160, abs=2)


def test_without_weights_each_source_comes_in_proportion_to_its_rows(sources):
    rows = stream(three(sources))
    epoch = rows.row_origins(0, rows.rows_per_epoch)
    for name in NAMES:
        have = ssa_pipelines.load_dataset_info(sources[name]).splits["train"].rows
        assert abs(sum(origin.source == name for origin in epoch) - have) < 2


@pytest.mark.parametrize("size", [2, 3])
def test_the_rows_of_a_mixed_step_do_not_depend_on_the_data_parallel_size(sources, size):
    alone = take(stream(three(sources), phases=WEIGHTS), 60)
    ranks = [take(stream(three(sources), phases=WEIGHTS, rank=rank, size=size), 60 // size) for rank in range(size)]
    assert equal([rows for micro_batch in zip(*ranks, strict=True) for rows in micro_batch], alone)


@pytest.mark.parametrize("position", [1, 19, 20, 21, 140])
def test_a_mixed_stream_resumes_exactly_before_in_and_after_a_change_of_phase(sources, position):
    full = take(stream(three(sources), phases=WEIGHTS), position + 9)
    first, second = (stream(three(sources), phases=WEIGHTS) for _ in range(2))
    take(first, position)
    second.load_state_dict(first.state_dict())
    assert equal(take(second, 9), full[position:])


def test_changed_data_and_weights_are_refused_with_every_difference_unless_there_is_a_reason(sources):
    first = stream({"code": sources["code"], "web": sources["web"]}, micro=1, batch=1)
    before = take(first, 31)
    state = first.state_dict()
    second = stream({"prose": sources["prose"], "web": sources["web"]}, micro=1, batch=1)
    for reason in (None, "", " "):
        with raises(DatasetMismatch, "position-of-other-data") as caught:
            second.load_state_dict(state, accept_changes=reason)
        for part in ("source code", "source prose", "phases"):
            assert part in caught.value.problem
        assert "data.accept_changes=REASON" in caught.value.remedy
    second.load_state_dict(state, accept_changes="code turned out to be garbled")
    after = take(second, 200)
    web = [r for r, p in zip(before, first.row_origins(0, 31), strict=True) if p.source == "web"]
    web += [r for r, p in zip(after, second.row_origins(31, 200), strict=True) if p.source == "web"]
    assert equal(web, take(stream(sources["web"], micro=1, batch=1), len(web)))  # no repeat, no gap
    prose = [r for r, p in zip(after, second.row_origins(31, 200), strict=True) if p.source == "prose"]
    assert equal(prose, take(stream(sources["prose"], micro=1, batch=1), len(prose)))
    [change] = second.state_dict()["changes"]
    assert (change["samples_seen"], change["reason"]) == (31, "code turned out to be garbled")
    third = stream({"prose": sources["prose"], "web": sources["web"]}, micro=1, batch=1)
    third.load_state_dict(second.state_dict())  # from here on no reason is needed
    assert equal(take(third, 9), take(second, 9))


def test_sources_of_different_row_lengths_are_refused(sources):
    with raises(DatasetMismatch, "sources-differ", "row_length", 77, sources["code"], 78, sources["other"]):
        stream({"code": sources["code"], "other": sources["other"]})


def test_evaluation_reads_each_source_in_proportion(sources):
    def evaluate(**options):
        layout = {"micro_batch_rows": 1, "data_parallel_rank": 0, "data_parallel_size": 1}
        return list(ssa_pipelines.evaluation_rows(three(sources), **{**layout, **options}))

    have = {name: ssa_pipelines.load_dataset_info(sources[name]).splits["validation"].rows for name in NAMES}
    whole = evaluate(rows=sum(have.values()))
    stored = [
        rows
        for name in NAMES
        for rows in take(stream(sources[name], split="validation", micro=1, batch=1, shuffle=False), have[name])
    ]
    assert equal(whole, stored)
    half = evaluate(rows=sum(have.values()) // 2)
    assert len(half) == sum(have.values()) // 2
    with raises(DatasetError, "too-few-rows", f"rows {len(whole) + 1}", f"holds {len(whole)}"):
        evaluate(rows=len(whole) + 1)
