"""Every wrong argument is refused with an error that names it; right ones that look odd are not.

One row per mistake.
"""

import pytest
import torch

import kernels
from kernels import BlockSpec, KernelArgumentError


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
    return kernels.ssa_attention(*tensors, **arguments)


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
    ("spec.block_count", {"spec": BlockSpec(4, 0)}),
    ("spec.topk", {"spec": BlockSpec(4, 2, "fast")}),
    ("spec.topk", {"spec": BlockSpec(16, 8, "authors")}),
    ("trunk", {"trunk": "both"}),
    ("scale", {"scale": -1.0}),
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
    with pytest.raises(KernelArgumentError) as caught:
        call(**change)
    text = str(caught.value)
    assert text.startswith(name + ":")
    assert "got" in text
    assert "expected" in text


def test_wrong_blocks_and_window_are_named():
    q, k = torch.randn(1, 20, 4, 8), torch.randn(1, 20, 2, 8)
    for blocks in (torch.zeros(1, 20, 4, 2, dtype=torch.int32), torch.zeros(1, 20, 2, 2)):
        with pytest.raises(KernelArgumentError, match=r"^blocks"):
            kernels.sparse_attention(q, k, k, BlockSpec(4, 2), blocks=blocks)
    with pytest.raises(KernelArgumentError, match=r"^window"):
        kernels.window_attention(q, k, k, 0)


def test_triton_on_a_cpu_is_refused():
    with pytest.raises(KernelArgumentError, match=r"^backend"):
        call(backend="triton")


def test_a_transposed_view_is_not_a_mistake():
    q = torch.randn(2, 4, 20, 8).transpose(1, 2)
    k = torch.randn(2, 2, 20, 8).transpose(1, 2)
    out = kernels.full_attention(q, k, k)
    torch.testing.assert_close(out, kernels.full_attention(q.contiguous(), k.contiguous(), k.contiguous()))
