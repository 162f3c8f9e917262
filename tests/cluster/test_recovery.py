"""A killed rank costs seconds: the figure of docs/operations.md."""

import pytest

from tests.cluster.recovery import measure


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_rank_is_followed_by_the_next_step_in_no_more_than_a_start_takes(tmp_path):
    """15 s where the machine is ours; where it is not, a restart is slower as a start is."""
    found = measure(tmp_path, 3)
    assert found["median_next_step"] <= max(15, 1.5 * found["cold"]), found
