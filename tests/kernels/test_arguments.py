"""Every wrong argument is refused with an error that names it; right ones that look odd are not.

One row per mistake.
"""

import re

import pytest
import torch

import ssa_kernels
from ssa_kernels import BlockSpec, KernelArgumentError
from tests.errors import raises


def call(**change):
    arguments = {
        "q": torch.randn(2, 20, 4, 8),
        "k": torch.randn(2, 20, 2, 8),
        "v": torch.randn(2, 20, 2, 8),
        "gate": torch.rand(2, 20, 4),
        "spec": BlockSpec(4, 2),
        "trunk": "full",
    }
    arguments |= change
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "gate", "spec")]
    return ssa_kernels.ssa_attention(*tensors, **arguments)


DOCS = torch.zeros(2, 20, dtype=torch.int32)
BROKEN = DOCS.clone()
BROKEN[1, 7] = 5
NOT_ZERO = DOCS + 1
WRONG = [
    ("q", {"q": "tensor"}),
    ("q.shape", {"q": torch.randn(2, 20, 8)}),
    ("q.shape", {"q": torch.randn(2, 0, 4, 8)}),
    ("q.dtype", {"q": torch.ones(2, 20, 4, 8, dtype=torch.int32)}),
    ("q.shape[1]", {"q": torch.randn(2, 19, 4, 8), "gate": torch.rand(2, 19, 4)}),
    ("q.shape[2] (Hq)", {"q": torch.randn(2, 20, 3, 8), "gate": torch.rand(2, 20, 3)}),
    ("k.dtype", {"k": torch.randn(2, 20, 2, 8).half()}),
    ("k.device", {"k": torch.randn(2, 20, 2, 8, device="meta")}),
    ("k.shape[0]", {"k": torch.randn(1, 20, 2, 8)}),
    ("k.shape[3]", {"k": torch.randn(2, 20, 2, 16)}),
    ("v.shape", {"v": torch.randn(2, 20, 1, 8)}),
    ("gate.shape", {"gate": torch.rand(2, 20, 2)}),
    ("gate.dtype", {"gate": torch.ones(2, 20, 4, dtype=torch.int64)}),
    ("spec", {"spec": (4, 2)}),
    ("spec.block_size", {"spec": BlockSpec(0, 2)}),
    ("spec.block_count", {"spec": BlockSpec(4, True)}),
    ("spec.block_count", {"spec": BlockSpec(4, 0)}),
    ("spec.topk", {"spec": BlockSpec(4, 2, "fast")}),
    ("spec.topk", {"spec": BlockSpec(16, 8, "reference")}),
    ("trunk", {"trunk": "both"}),
    ("scale", {"scale": -1.0}),
    ("scale", {"scale": True}),
    ("q.layout", {"q": torch.randn(2, 20, 4, 8).to_sparse()}),
    ("k.layout", {"k": torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (20, 9)], layout=torch.jagged)}),
    ("backend", {"backend": "cuda"}),
    ("doc_starts.dtype", {"doc_starts": DOCS.long()}),
    ("doc_starts.shape", {"doc_starts": DOCS[:, :19]}),
    ("doc_starts[1, 7]", {"doc_starts": BROKEN}),
    ("doc_starts[0, 0]", {"doc_starts": NOT_ZERO}),
    ("query_index.dtype", {"query_index": torch.arange(20)}),
    ("query_index.shape", {"query_index": torch.arange(19, dtype=torch.int32)}),
    ("query_index", {"query_index": torch.arange(1, 21, dtype=torch.int32)}),
    ("query_index", {"query_index": torch.arange(-1, 19, dtype=torch.int32)}),
]


@pytest.mark.parametrize(("name", "change"), WRONG, ids=[f"{i}-{name}" for i, (name, _) in enumerate(WRONG)])
def test_a_wrong_argument_is_named(name, change):
    with raises(KernelArgumentError, re.split(r"[\[ ]", name)[0]) as caught:
        call(**change)
    assert caught.value.args[0] == name


def test_wrong_blocks_and_window_are_named():
    q, k = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8)
    heads, floats = torch.zeros(1, 20, 4, 2, dtype=torch.int32), torch.zeros(1, 20, 2, 2)
    for id, blocks in (("blocks.shape", heads), ("blocks.dtype", floats)):
        with raises(KernelArgumentError, id):
            ssa_kernels.sparse_attention(q, k, k, BlockSpec(4, 2), blocks=blocks)
    with raises(KernelArgumentError, "window", 0):
        ssa_kernels.window_attention(q, k, k, 0)
    with raises(KernelArgumentError, "window", True):
        ssa_kernels.window_attention(q, k, k, True)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        (-2, "-2..4"),
        (5, "-1..5"),
        (1 << 28, 1 << 28),  # times the block size it wraps around, into other tensors' memory
        (4, "blocks[0, 19, 1]: got block 4 twice"),
    ],
)
def test_blocks_that_select_blocks_never_gives_are_named(wrong, named):
    q, k = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8)
    blocks = torch.zeros(1, 20, 2, 2, dtype=torch.int32)
    blocks[..., 0] = torch.arange(20)[:, None] // 4
    blocks[..., 1] = torch.where(blocks[..., 0] > 0, 0, -1)
    ssa_kernels.sparse_attention(q, k, k, BlockSpec(4, 2), blocks=blocks)
    blocks[0, 19, 1, 1] = wrong
    for call in (
        lambda: ssa_kernels.sparse_attention(q, k, k, BlockSpec(4, 2), blocks=blocks),
        lambda: ssa_kernels.ssa_attention(q, k, k, q[..., 0], BlockSpec(4, 2), trunk="full", blocks=blocks),
    ):
        with raises(KernelArgumentError, "blocks", named):
            call()


def test_a_budget_beyond_the_row_costs_no_more_than_the_row():
    q, k = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8)
    gate, beyond = torch.rand(1, 20, 4), BlockSpec(4, 10**12)  # lists of that length would fit nowhere
    full = ssa_kernels.full_attention(q, k, k)
    torch.testing.assert_close(ssa_kernels.sparse_attention(q, k, k, beyond), full)
    assert float(ssa_kernels.ssa_attention(q, k, k, gate, beyond, trunk="full")[1]) == 0.0
    torch.testing.assert_close(ssa_kernels.attention_statistics(q, k, beyond).sparsity, torch.ones(4))


def test_triton_on_a_cpu_is_refused():
    with raises(KernelArgumentError, "backend"):
        call(backend="triton")


def test_what_the_triton_kernels_cannot_number_is_refused():
    """Shapes alone are looked at, so tensors without storage will do."""
    refuse = pytest.importorskip("ssa_kernels.triton.backend").refuse
    q, k = (torch.empty(2, 1 << 17, heads, 64, dtype=torch.half, device="meta") for heads in (32, 2))
    refuse(q, k, 4095)
    with raises(KernelArgumentError, "spec.block_count", 4096, 2147483648):
        refuse(q, k, 4096)
    refuse(torch.empty(65535, 1, 1, 16, device="meta"))
    with raises(KernelArgumentError, "q.shape", "q.shape[0]", 65536):
        refuse(torch.empty(65536, 1, 1, 16, device="meta"))


def test_a_transposed_view_is_not_a_mistake():
    q = torch.randn(2, 4, 20, 8).transpose(1, 2)
    k = torch.randn(2, 2, 20, 8).transpose(1, 2)
    out = ssa_kernels.full_attention(q, k, k)
    torch.testing.assert_close(out, ssa_kernels.full_attention(q.contiguous(), k.contiguous(), k.contiguous()))
