"""What every kernel test on a GPU starts with: memory that is NaN where nobody wrote, and kernels compiled in parallel.

Compiling, not running, is what these tests would spend their minutes on.
"""

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from .grid import GRID, compile_case


@pytest.fixture(autouse=True)
def poisoned_memory(cuda):
    """torch.empty returns NaN, so that an element no kernel wrote is seen; algorithms are deterministic for it."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()


@pytest.fixture(scope="session", autouse=True)
def compiled(request):
    """The grid's kernels in Triton's cache on disk; a case that fails here fails again, and is reported, as a test."""
    chosen = sum("test_accuracy_grid" in item.nodeid for item in request.session.items)
    if chosen < 4 or not torch.cuda.is_available():
        return
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(compile_case, *pair) for pair in reversed(GRID)]:
            done.exception()
