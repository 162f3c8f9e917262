"""A killed rank costs seconds: the figure of cluster/README.md."""

import statistics

import pytest

from tests.cluster.recovery import measure


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_rank_is_followed_by_the_next_step_within_seconds(tmp_path):
    kills = measure(tmp_path, 3)
    assert statistics.median(kill["next_step"] for kill in kills) <= 15, kills
