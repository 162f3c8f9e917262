"""The watchdog's judgement on heartbeats: whom it names, when, and what it forgives."""

import pytest

from ssa_megatron.config import load_recipe
from ssa_megatron.config.sections import Watchdog
from ssa_megatron.errors import ConfigError
from ssa_megatron.train.watchdog import Watch
from tests.errors import raises

SETTINGS = Watchdog(heartbeat=1.0, silence=20.0, stuck=100.0)


def beat(rank: int, count: int, *, phase="compute", step=7, marks=40, waits=True) -> dict:
    return {
        "rank": rank,
        "beat": count,
        "phase": phase,
        "step": step,
        "marks": marks,
        "waits": waits,
        "fresh": False,
        "pid": 1000 + rank,
        "host": "n1",
        "at": "train/step.py:70 train_step",
    }


def look(watch, now, beats, own=None, heard=True):
    """Of a watcher on rank 0 whose own line moves on."""
    return watch.look(beats, own or beat(0, int(now), marks=int(now)), now, heard=heard)


def silence(watch, until: float, **others) -> tuple[float | None, float | None, list[str]]:
    """(seconds after which rank 1 is named, seconds after which the job is ended, what was said) when rank 1 says no more."""
    named, said, now = None, [], 0.0
    while now < until:
        news = look(watch, now, {1: beat(1, 1), 2: beat(2, int(now))}, **others)
        said += news.said
        named = named if named is not None or not news.said else now
        if news.verdict:
            return named, now, [*said, news.verdict]
        now += 1.0
    return named, None, said


def test_a_silent_rank_is_named_within_a_heartbeat_and_five_seconds_and_the_job_ends_after_silence():
    named, ended, said = silence(Watch([1, 2], SETTINGS), 60)
    assert named == 4.0
    assert named + 2 * SETTINGS.heartbeat <= SETTINGS.heartbeat + 5  # its last line was up to two looks old
    assert ended == 21.0
    assert len(said) == 2
    assert "rank 1 (pid 1001 on n1) has been silent for 4.0 s, in compute of step 7, at train/step.py:70" in said[0]
    assert "ending the job" in said[1]


def test_a_rank_that_comes_back_is_said_to_be_back_and_ends_nothing():
    watch = Watch([1, 2], SETTINGS)
    silence(watch, 10)
    news = look(watch, 10, {1: beat(1, 2), 2: beat(2, 10)})
    assert news.said == ["rank 1 (pid 1001 on n1) is back"]
    assert news.verdict is None


def test_a_rank_that_never_sent_a_line_is_named_too():
    watch = Watch([1], SETTINGS)
    said = [text for now in range(6) for text in look(watch, now, {1: None}).said]
    assert said == ["rank 1 has been silent for 4.0 s, before its first heartbeat; the job ends in 16 s"]


def test_a_rank_that_has_ended_is_not_missed():
    watch = Watch([1], SETTINGS)
    news = [look(watch, now, {1: beat(1, 3, phase="ended")}) for now in range(40)]
    assert not any(one.said or one.verdict for one in news)


def test_a_watcher_that_was_stopped_itself_gives_everybody_a_new_chance():
    watch = Watch([1, 2], SETTINGS)
    silence(watch, 3)
    news = look(watch, 500.0, {1: beat(1, 1), 2: beat(2, 3)})
    assert not news.said
    assert news.verdict is None


def test_a_watcher_that_cannot_write_its_own_line_accuses_nobody():
    assert silence(Watch([1, 2], SETTINGS), 60, heard=False) == (None, None, [])


def standstill(own: dict, others: list[dict], *, settings=SETTINGS) -> tuple[list[str], str | None, int]:
    """What is said, the verdict and when, while heartbeats go on and nobody enters another phase."""
    watch, said = Watch([one["rank"] for one in others], settings), []
    for now in range(1000):
        news = watch.look({one["rank"]: one | {"beat": now + 1} for one in others}, own, float(now), heard=True)
        said += news.said
        if news.verdict:
            return said, news.verdict, now
    return said, None, 1000


def test_of_ranks_that_stand_still_the_one_with_the_fewest_phases_behind_it_is_named():
    late = beat(1, 1, phase="data", step=8, marks=39, waits=False)
    said, verdict, seconds = standstill(beat(0, 1), [late, beat(2, 1)])
    assert len(said) == 1
    assert said[0].startswith("no rank has moved for 21 s; rank 1 did not arrive: in data of step 8, 2 wait;")
    assert "rank 1 did not arrive" in verdict
    assert seconds == 101


def test_of_ranks_in_one_phase_the_ones_that_wait_for_nobody_are_named():
    _, verdict, _ = standstill(beat(0, 1), [beat(1, 1), beat(2, 1, waits=False), beat(3, 1, waits=False)])
    assert "ranks 2, 3 did not arrive: in compute of step 7, 2 wait" in verdict


def test_when_all_wait_at_one_place_nobody_is_accused():
    _, verdict, _ = standstill(beat(0, 1), [beat(1, 1), beat(2, 1)])
    assert "all are in compute of step 7: their stacks tell more" in verdict


@pytest.mark.parametrize("phase", ["save", "restore"])
def test_writing_and_reading_checkpoints_takes_as_long_as_the_disk_does(phase):
    assert standstill(beat(0, 1), [beat(1, 1, phase=phase, waits=False)]) == ([], None, 1000)


def test_the_first_step_after_a_start_has_longer():
    _, _, seconds = standstill(beat(0, 1) | {"fresh": True}, [beat(1, 1)])
    assert seconds == 541


def test_stuck_zero_leaves_it_to_the_collectives():
    settings = Watchdog(heartbeat=1.0, silence=20.0, stuck=0)
    assert standstill(beat(0, 1), [beat(1, 1)], settings=settings) == ([], None, 1000)


def test_a_silence_shorter_than_three_heartbeats_is_refused_by_name():
    with raises(ConfigError, "silence-too-short", "silence=5.0", "heartbeat=2.0"):
        load_recipe("demo", ["watchdog.heartbeat=2", "watchdog.silence=5"])
