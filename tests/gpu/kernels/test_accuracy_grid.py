"""The Triton kernels against fp64 on the GPU, over the grid of the proof (`grid.py`), outputs and every gradient.

The judge is `ssa_kernels.reference.accuracy`: norms of 5e-3 and 1e-2, largest errors of 2 and 3 times
PyTorch's own in half precision; 2e-5 in
fp32; selections equal to fp64's except where scores tie. Outputs start as NaN.
"""

import pytest
import torch

from ssa_kernels.reference import accuracy, masked

from .grid import CASES, GRID, WIDTH, build, check_selection, loss_weight, run, streams

pytestmark = pytest.mark.gpu


def check(leaves, upstream, spec, options, names, trunk="full", logit=0.0):
    blocks, got = run(leaves, upstream, spec, options, names, trunk)
    scale, dtype = leaves[0].shape[3] ** -0.5, leaves[0].dtype
    masks = masked.Masks(*leaves[:2], spec, *options.values())
    check_selection(blocks, leaves, spec, options)
    fixed = names, leaves, upstream, masks, blocks, scale, loss_weight(upstream)
    kinds = {"trunk": trunk, "width": WIDTH}
    truth = masked.reference(*fixed, torch.float64, **kinds)
    own = masked.yardsticks(*fixed, dtype=dtype, **kinds)
    found = [e for name in names for e in accuracy.errors(name, got[name], truth[name], own[name], dtype)]
    failed = [v.text for v in accuracy.verdicts(found, logit) if v.failed]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize(("case", "dtype"), GRID, ids=str)
def test_every_stream_matches_fp64(case, dtype):
    check(*build(case, dtype), streams(case, dtype))


@pytest.mark.parametrize(("case", "dtype"), [(c, d) for c, d in GRID if c[0] <= 2000], ids=str)
def test_ssa_with_the_sparse_trunk_matches_fp64(case, dtype):
    check(*build(case, dtype), ("ssa",), trunk="sparse")


@pytest.mark.parametrize("sharpness", [4.0, 16.0])
@pytest.mark.parametrize("case", [CASES[8], CASES[11]], ids=str)
def test_sharp_logits(case, sharpness):
    check(*build(case, torch.bfloat16, sharpness), ("full", "sparse", "ssa"))


@pytest.mark.parametrize("gap", [0.0, 40.0, 90.0, 120.0])
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (CASES[8], torch.bfloat16),
        (CASES[15], torch.bfloat16),
        (CASES[18], torch.float32),
        (CASES[10], torch.bfloat16),
        (CASES[11], torch.bfloat16),
        (CASES[10], torch.float16),  # one pass for both
    ],
    ids=str,
)
def test_scores_far_above_the_rest(case, dtype, gap):
    """A key `gap` nats above all others, which routing cannot see: its neighbours pull the block's mean down."""
    leaves, upstream, spec, options = build(case, dtype)
    with torch.no_grad():
        q, k = leaves[:2]
        size, lift = spec.block_size, gap / (4.0 * q.shape[3] ** -0.5)
        q[..., 0], k[..., 0] = 4.0, 0.0
        k[:, :size, :, 0] = -lift / (size - 1)
        k[:, 5, :, 0] = lift
    check(leaves, upstream, spec, options, ("full", "sparse", "ssa"), trunk="sparse", logit=gap)
