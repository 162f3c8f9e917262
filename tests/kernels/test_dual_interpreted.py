"""Both streams in one pass over key tiles, under Triton's interpreter: against the PyTorch backend and the oracle.

Like test_triton_interpreted.py it runs itself again in a process where the interpreter is chosen before triton is
imported. Tiles are small there, so that short rows have whole, masked and partial ones.
"""

import pytest

from .interpreted import INSIDE, run_again

if not INSIDE:

    def test_dual_kernels_under_the_interpreter():
        run_again(__file__)

else:
    import torch

    import ssa_kernels
    from ssa_kernels import BlockSpec
    from ssa_kernels.reference import oracle
    from ssa_kernels.triton import backend as triton_backend
    from ssa_kernels.triton import dual as triton_dual
    from ssa_kernels.triton import dual_backward as triton_dual_backward
    from ssa_kernels.triton import tiles as triton_config

    from .support import assert_close, documents, inputs, outputs_and_gradients

    # n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none)
    CASES = [
        (1, 1, 1, 16, 16, 2, 0),
        (37, 2, 2, 16, 16, 2, 0),
        (41, 4, 2, 32, 16, 2, 20),
        (40, 3, 1, 20, 32, 1, 0),
        (35, 8, 1, 16, 16, 2, 5),
        (9, 1, 1, 16, 16, 2, 1),
        (43, 1, 1, 16, 128, 1, 30),
    ]

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_one_pass_over_keys_is_the_method(case, monkeypatch):
        n, h_q, h_kv, dim, size, count, mean_length = case
        leaves, upstream = inputs(1, n, h_q, h_kv, dim)
        docs = documents(1, n, mean_length) if mean_length else None
        spec, trunk = BlockSpec(size, count), "full" if h_q % 4 else "sparse"
        monkeypatch.setattr(triton_backend, "dual", lambda *_: True)
        ours, theirs = (
            outputs_and_gradients(
                ssa_kernels.ssa_attention(*leaves, spec, trunk=trunk, doc_starts=docs, backend=b), upstream, leaves
            )
            for b in ("triton", "torch")
        )
        assert_close(ours, theirs, 1e-5)

    def test_short_rows_of_small_groups_take_it_and_scattered_queries_do_not():
        q, k = torch.zeros(1, 64, 4, 16), torch.zeros(1, 64, 2, 16)
        assert triton_config.dual(q, k, 16, 16, None, None)
        assert not triton_config.dual(q, k, 16, 16, None, torch.arange(64))
        assert not triton_config.dual(q, k, 24, 16, None, None)
        assert not triton_config.dual(torch.empty(1, 2**30, 4, 16, device="meta"), k, 16, 16, None, None)

    def test_a_token_that_selected_nothing_gives_zeros(monkeypatch):
        leaves, upstream = inputs(1, 18, 2, 1, 16)
        blocks = ssa_kernels.select_blocks(*leaves[:2], BlockSpec(16, 2), backend="torch")
        blocks[:, 5] = -1
        monkeypatch.setattr(triton_backend, "dual", lambda *_: True)
        known = {"trunk": "sparse", "blocks": blocks}
        ours, theirs = (
            outputs_and_gradients(
                ssa_kernels.ssa_attention(*leaves, BlockSpec(16, 2), **known, backend=b), upstream, leaves
            )
            for b in ("triton", "torch")
        )
        assert not ours[0][:, 5].any()
        assert_close(ours, theirs, 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("gap", [0, 40, 90, 120])
    def test_an_unselected_key_far_above_every_selected_one(gap, dtype):
        (q, k, v, _), upstream = inputs(1, 70, 2, 1, 16, grad=False)
        blocks = ssa_kernels.select_blocks(q, k, BlockSpec(16, 3), backend="torch")
        blocks[..., 1:] = blocks[..., 1:].masked_fill(blocks[..., 1:] == 0, -1)
        q[..., 0], k[:, 5], k[:, 5, :, 0] = 4.0, 0.0, gap * 16**0.5 / 4  # key 5 scores `gap` nats, in no selection
        q, k, v, up_full = (x.to(dtype) for x in (q, k, v, upstream))
        up_sparse = up_full.flip(1).contiguous()
        truth = [x.double().requires_grad_() for x in (q, k, v)]
        expected = [
            oracle.full_attention(*truth, 0.25),
            oracle.sparse_attention(*truth, BlockSpec(16, 3), 0.25, blocks=blocks),
        ]
        total = (expected[0] * up_full).sum() + (expected[1] * up_sparse).sum()
        expected += torch.autograd.grad(total, truth)
        bits = triton_dual.selection_bits(blocks, 70, 16, None)
        config = triton_config.GENERAL
        full, lse_full, sparse, lse_sparse = triton_dual.forward(q, k, v, *bits, 16, 0.25, None, config)
        deltas = [(o * u).sum(-1).float().detach() for o, u in zip(expected[:2], (up_full, up_sparse), strict=True)]
        grads = triton_dual_backward.backward(
            q, k, v, blocks, 16, 0.25, None, up_full, up_sparse, lse_full, lse_sparse, *deltas, config
        )
        assert_close([full, sparse, *grads], expected, 2e-5 if dtype == torch.float32 else 2e-3)
