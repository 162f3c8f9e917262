"""Two ranks on one GPU, over gloo, compute what one rank computes. gloo sends no GPU tensors, hence no pipeline here."""

import pytest

from .cases import WITHOUT_PIPELINE, compare_all, judge_case

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "0")
        return compare_all(tmp_path_factory.mktemp, WITHOUT_PIPELINE)


@pytest.mark.parametrize("case", WITHOUT_PIPELINE)
def test_two_ranks_compute_what_one_computes(results, case):
    judge_case(results, case)
