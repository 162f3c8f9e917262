"""Two ranks with a GPU each, over NCCL, compute what one rank computes, pipelines included."""

import pytest

from .cases import PIPELINES, WITHOUT_PIPELINE, compare_all, judge_case

CASES = WITHOUT_PIPELINE | PIPELINES
pytestmark = [pytest.mark.gpu, pytest.mark.two_gpus, pytest.mark.timeout(500)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return compare_all(tmp_path_factory.mktemp, CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_computes(results, case):
    judge_case(results, case)
