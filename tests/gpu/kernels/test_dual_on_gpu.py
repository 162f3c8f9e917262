"""Both streams in one pass over key tiles against fp64: groups of 1 to 8, block sizes, documents, three dtypes.

The rule that chooses this pass by length is put aside here; the grid, where it holds, meets the pass too.
"""

import pytest
import torch

from ssa_kernels.triton import backend as triton_backend

from .grid import build
from .test_accuracy_grid import check

pytestmark = pytest.mark.gpu

# n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none), query rows (0 = all)
CASES = [
    (1, 8, 8, 128, 16, 4, 0, 0),
    (17, 4, 2, 64, 16, 2, 5, 0),
    (129, 8, 1, 128, 16, 4, 0, 0),
    (1000, 16, 2, 64, 16, 16, 300, 0),
    (1000, 8, 4, 64, 128, 3, 150, 0),
    (1000, 4, 2, 32, 32, 8, 90, 0),
    (2003, 8, 8, 128, 16, 16, 500, 0),
    (2048, 8, 2, 64, 64, 4, 700, 0),
    (4100, 4, 1, 128, 16, 16, 0, 0),
]
SOME = [(case, dtype) for dtype in (torch.float16, torch.float32) for case in CASES[1:6:2]]


@pytest.mark.parametrize(("case", "dtype"), [(case, torch.bfloat16) for case in CASES] + SOME, ids=str)
def test_one_pass_over_keys_matches_fp64(case, dtype, monkeypatch):
    monkeypatch.setattr(triton_backend, "dual", lambda *_: True)
    for trunk in ("full", "sparse"):
        check(*build(case, dtype), ("ssa",), trunk=trunk)
