"""Two ranks with a GPU each, over NCCL, compute what one rank computes, pipelines included."""

import pytest
import torch

from .cases import PIPELINES, WITHOUT_PIPELINE, compare_all, judge_case

CASES = WITHOUT_PIPELINE | PIPELINES
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(500),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: NCCL refuses two ranks on one"),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return compare_all(tmp_path_factory.mktemp, CASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_computes(results, case):
    judge_case(results, case)
