"""Asked for without the CUDA devices they need, the GPU tests fail and say so: skipped, they would look as if they had passed."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def cuda(request):
    if not torch.cuda.is_available():
        pytest.fail("needs a CUDA device; `make test` is the run without one", pytrace=False)
    if request.node.get_closest_marker("two_gpus") and torch.cuda.device_count() < 2:
        pytest.fail("needs two CUDA devices, because NCCL refuses two ranks on one", pytrace=False)
