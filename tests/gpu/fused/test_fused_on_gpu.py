"""Every fused operation on a GPU against its plain reference in fp64, on odd sizes and on a model's."""

import pytest
import torch.distributed as dist

from tests.ssa_megatron.model import fused_checks as checks

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module")
def group():
    """A process group of this process alone."""
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    if ours:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", checks.BOUND)
@pytest.mark.parametrize("shape", [*checks.SWIGLU, (129, 1, 16384)])
def test_swiglu_equals_its_reference(shape, dtype):
    checks.check_swiglu(shape, dtype, DEVICE)


@pytest.mark.parametrize("dtype", checks.BOUND)
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("passed", [False, True])
@pytest.mark.parametrize("shape", [*checks.SUM_AND_NORM, (130, 1, 2048), (9, 2, 5120)])
def test_sum_and_norm_equal_their_reference(shape, passed, adds, dtype):
    checks.check_sum_and_norm(shape, passed, adds, dtype, DEVICE)


@pytest.mark.parametrize("dtype", checks.BOUND)
@pytest.mark.parametrize("sizes", [*checks.QKV, (100, 2, 2, 16, 64), (65, 1, 8, 4, 128)])
def test_split_and_rotation_equal_their_reference(sizes, dtype):
    checks.check_split_and_rotation(*sizes, dtype, DEVICE)


@pytest.mark.parametrize("dtype", checks.BOUND)
@pytest.mark.parametrize("case", [*checks.CROSS_ENTROPY, ((7, 2), 32000, 32000), ((11,), 128256, 128000)])
def test_cross_entropy_equals_its_reference(group, case, dtype):
    checks.check_cross_entropy(group, *case, dtype, DEVICE)
