"""Asked for without a CUDA device, the GPU tests fail and say so: skipped, they would look as if they had passed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda():
    if not torch.cuda.is_available():
        pytest.fail("needs a CUDA device; `make test` is the run without one", pytrace=False)
