"""The Triton kernels on a machine without a GPU: small shapes under Triton's interpreter, against the PyTorch backend.

The interpreter must be chosen before triton is imported, so one test runs this file again in a process of its own.
bf16 is left to the GPU: the interpreter's bf16 products are wrong.
"""

import re

import pytest

from tests.errors import raises

from .interpreted import INSIDE, run_again

if not INSIDE:

    def test_kernels_under_the_interpreter():
        run_again(__file__)

else:
    import torch

    import ssa_kernels
    from ssa_kernels import BlockSpec, autograd
    from ssa_kernels.reference import accuracy, masked
    from ssa_kernels.triton import backend as triton_backend
    from ssa_kernels.triton import sparse as triton_sparse

    from .support import assert_close, assert_same_selection, documents, inputs, outputs_and_gradients, places

    # n, Hq, Hkv, D, block_size, block_count, mean document length (0 = none), query rows (0 = all)
    CASES = [
        (1, 1, 1, 16, 16, 2, 0, 0),
        (35, 2, 1, 16, 8, 2, 0, 0),
        (33, 4, 4, 16, 4, 3, 14, 0),
        (40, 3, 1, 20, 8, 3, 0, 17),
        (21, 2, 2, 32, 4, 3, 9, 11),
    ]

    def build(case):
        n, h_q, h_kv, dim, size, count, mean_length, rows = case
        leaves, upstream = inputs(1, n, h_q, h_kv, dim, n_q=rows or None)
        docs = documents(1, n, mean_length) if mean_length else None
        index = places(n, rows) if rows else None
        return leaves, upstream, BlockSpec(size, count), {"doc_starts": docs, "query_index": index}

    def agree(function, *arguments, upstream, leaves, **options):
        ours, theirs = (
            outputs_and_gradients(function(*arguments, **options, backend=b), upstream, leaves)
            for b in ("triton", "torch")
        )
        assert_close(ours, theirs, 1e-5, function.__name__)

    # Selections alone: lists cut once, often and never, budgets beyond a chunk of the list, documents of one token.
    SELECTIONS = [
        (70, 2, 1, 16, 16, 1, 0, 0),
        (90, 2, 1, 16, 2, 2, 0, 0),
        (60, 1, 1, 16, 2, 3, 1, 0),
        (300, 2, 2, 16, 4, 16, 0, 33),
        (400, 6, 2, 16, 2, 16, 130, 40),
        (900, 3, 1, 16, 2, 130, 0, 20),
        (1700, 2, 2, 16, 4, 200, 0, 10),
        (1300, 4, 2, 16, 16, 16, 600, 35),
        (1500, 4, 1, 16, 64, 5, 0, 20),
        (1100, 1, 1, 16, 128, 3, 0, 9),
    ]

    @pytest.mark.parametrize("case", CASES + SELECTIONS, ids=str)
    def test_selection(case):
        leaves, _, spec, options = build(case)
        blocks = ssa_kernels.select_blocks(*leaves[:2], spec, **options, backend="triton")
        assert_same_selection(blocks, *leaves[:2], spec, **options)

    @pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
    def test_equal_scores_go_to_the_lower_blocks(heads):
        (q, k, _, _), _ = inputs(1, 500, *heads, 16, n_q=40, grad=False)
        k[..., 1:] = 0  # a sum of one product: however a CPU's matrix product adds, equal columns stay equal
        index, k = places(500, 40), k[:, :1].expand(-1, 500, -1, -1)
        blocks = ssa_kernels.select_blocks(q, k, BlockSpec(2, 9), query_index=index, backend="triton")
        own = index[:, None] // 2
        lowest = torch.arange(8).expand(40, -1)
        expected = torch.cat([own, torch.where(lowest < own, lowest, -1)], 1)
        assert torch.equal(blocks, expected[None, :, None].expand_as(blocks).int())

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_dense_streams(case):
        leaves, upstream, spec, options = build(case)
        known = {"upstream": upstream, "leaves": leaves[:3], **options}
        agree(ssa_kernels.full_attention, *leaves[:3], **known)
        agree(ssa_kernels.window_attention, *leaves[:3], 9, **known)
        agree(ssa_kernels.compressed_attention, *leaves[:3], spec, **known)

    @pytest.mark.parametrize("window", [35, 2**31 - 1, 2**40])
    def test_a_window_beyond_the_row_is_the_whole_row(window):
        """Added to a position it would leave 32 bits, and keys that wrap around get no gradient."""
        leaves, upstream, _, options = build(CASES[1])
        known = {"upstream": upstream, "leaves": leaves[:3], **options}
        agree(ssa_kernels.window_attention, *leaves[:3], window, **known)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_both_streams_gated(case):
        leaves, upstream, spec, options = build(case)
        trunk = "full" if case[0] % 2 else "sparse"
        agree(ssa_kernels.ssa_attention, *leaves, spec, trunk=trunk, upstream=upstream, leaves=leaves, **options)

    def test_documents_that_change_before_the_backward_pass_are_refused(monkeypatch):
        leaves, _, spec, options = build(CASES[2])
        streams = [
            lambda docs: ssa_kernels.full_attention(*leaves[:3], doc_starts=docs, backend="triton"),
            lambda docs: ssa_kernels.sparse_attention(*leaves[:3], spec, doc_starts=docs, backend="triton"),
            lambda docs: ssa_kernels.ssa_attention(*leaves, spec, trunk="full", doc_starts=docs, backend="triton")[0],
        ]
        for dual in (False, True):
            monkeypatch.setattr(triton_backend, "dual", lambda *_, dual=dual: dual)
            spec = BlockSpec(16, 2) if dual else spec
            for stream in streams[-1:] if dual else streams:
                docs = options["doc_starts"].clone()
                out = stream(docs)
                docs[:, 20:] = 20
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(out.sum(), leaves[:3])

    @pytest.mark.parametrize("dual", [False, True], ids=["apart", "one pass"])
    def test_a_second_derivative_is_refused(dual, monkeypatch):
        monkeypatch.setattr(triton_backend, "dual", lambda *_: dual)
        leaves, _ = inputs(1, 20, 2, 1, 16)
        out, loss = ssa_kernels.ssa_attention(*leaves, BlockSpec(16, 2), trunk="full", backend="triton")
        first = torch.autograd.grad(out.sum() + loss, leaves, create_graph=True)
        with pytest.raises(RuntimeError, match=re.escape(autograd.SECOND)):
            torch.autograd.grad(sum(g.sum() for g in first), leaves, allow_unused=True)

    def test_sparse_stream_alone():
        leaves, upstream, spec, options = build(CASES[2])
        agree(ssa_kernels.sparse_attention, *leaves[:3], spec, upstream=upstream, leaves=leaves[:3], **options)

    def test_blocks_too_large_for_one_tile_are_walked_in_parts(monkeypatch):
        monkeypatch.setattr(triton_sparse, "TILE_BYTES", 512)
        leaves, upstream, spec, options = build((70, 2, 1, 16, 32, 2, 40, 0))
        agree(ssa_kernels.sparse_attention, *leaves[:3], spec, upstream=upstream, leaves=leaves[:3], **options)

    def test_authors_selection():
        (q, k, _, _), _ = inputs(1, 700, 1, 1, 16, grad=False)
        index = torch.arange(300, 700, 40, dtype=torch.int32)
        ours, theirs = (
            ssa_kernels.select_blocks(q[:, index], k, BlockSpec(topk="reference"), query_index=index, backend=b)
            for b in ("triton", "torch")
        )
        assert torch.equal(ours, theirs)

    def test_bf16_is_refused_because_the_interpreter_multiplies_it_wrongly():
        (q, k, v, _), _ = inputs(1, 20, 2, 1, 16, grad=False)
        with raises(ssa_kernels.KernelArgumentError, "q.dtype", torch.bfloat16):
            ssa_kernels.full_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="triton")

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
    def test_gradients_cancel_where_one_key_has_all_the_weight(dtype):
        """A key 40 nats above all others: dq and dk are what is left of two equal terms, each far larger than they are."""
        leaves, upstream = inputs(2, 96, 8, 2, 32)
        leaves = [x.detach().to(dtype).requires_grad_() for x in leaves]
        spec, scale = BlockSpec(16, 4), 32**-0.5
        lift = 40.0 / (4.0 * scale)
        with torch.no_grad():
            leaves[0][..., 0], leaves[1][..., 0] = 4.0, 0.0
            leaves[1][:, :16, :, 0] = -lift / 15
            leaves[1][:, 5, :, 0] = lift
        blocks = ssa_kernels.select_blocks(*leaves[:2], spec, backend="triton")
        weight = 100.0 * upstream.numel() ** 0.5

        def call():
            return ssa_kernels.ssa_attention(*leaves, spec, trunk="sparse", blocks=blocks, backend="triton")

        got = {"ssa": masked.results(call, leaves, upstream.to(dtype), weight)}
        masks = masked.Masks(*leaves[:2], spec, None, None)
        fixed = ("ssa",), leaves, upstream.to(dtype), masks, blocks, scale, weight
        truth = masked.reference(*fixed, torch.float64, trunk="sparse", width=1)
        own = masked.yardsticks(*fixed, dtype=dtype, trunk="sparse", width=1)
        found = accuracy.errors("ssa", got["ssa"], truth["ssa"], own["ssa"], dtype)
        failed = [verdict.text for verdict in accuracy.verdicts(found, 40.0) if verdict.failed]
        assert not failed, "\n".join(failed)
