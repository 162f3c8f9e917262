"""What surrounds a call: autocast, the current device, second derivatives, tensors written to before the backward pass, and
what is remembered of documents.
"""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import ssa_kernels
from ssa_kernels import autograd, layout
from ssa_kernels.triton import backend as triton_backend

from .support import SPEC, inputs

STREAMS = {
    "full": lambda x, **options: ssa_kernels.full_attention(*x[:3], **options),
    "sparse": lambda x, **options: ssa_kernels.sparse_attention(*x[:3], SPEC, **options),
    "window": lambda x, **options: ssa_kernels.window_attention(*x[:3], 20, **options),
    "compressed": lambda x, **options: ssa_kernels.compressed_attention(*x[:3], SPEC, **options),
    "ssa": lambda x, **options: sum(y.sum() for y in ssa_kernels.ssa_attention(*x, SPEC, trunk="full", **options)),
}
EACH = pytest.mark.parametrize("stream", STREAMS)


def two_documents() -> torch.Tensor:
    starts = torch.zeros(2, 100, dtype=torch.int32)
    starts[:, 37:] = 37
    return starts


@EACH
def test_autocast_rounds_nothing(stream):
    """It would make every product half precision, in the backward pass too, and select other blocks."""
    leaves, _ = inputs(2, 100, 4, 2, 16)
    found = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            blocks = ssa_kernels.select_blocks(*leaves[:2], SPEC)
            out = STREAMS[stream](leaves)
            found.append([blocks, out, *torch.autograd.grad(out.sum(), leaves[:3])])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_autocast_rounds_no_statistics_and_no_cached_attention():
    (q, k, v, _), _ = inputs(2, 100, 4, 2, 16, grad=False)
    cache = ssa_kernels.KVCache(2, 100, 2, 16, dtype=torch.float32)
    cache.append(k, v)
    found = []
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            found.append([*ssa_kernels.attention_statistics(q, k, SPEC)])
            found[-1] += [ssa_kernels.cached_attention(q[:, -n:], cache, SPEC) for n in (1, 20)]
            found[-1].append(ssa_kernels.cached_blocks(q[:, -1:], cache, SPEC))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_tensors_device_is_made_current(monkeypatch):
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device.index) or nullcontext())
    for index in (0, 1):
        with autograd.plain(SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))):
            pass
    assert entered == [1]


@EACH
def test_a_second_derivative_is_refused(stream):
    leaves, _ = inputs(2, 100, 4, 2, 16)
    first = torch.autograd.grad(STREAMS[stream](leaves).sum(), leaves[:3], create_graph=True)
    for x in leaves[:3]:
        with pytest.raises(RuntimeError, match=re.escape(autograd.SECOND)):
            torch.autograd.grad(sum(g.square().sum() for g in first), x, retain_graph=True, allow_unused=True)


def test_a_graph_of_gradients_that_nobody_follows_does_no_harm():
    leaves, _ = inputs(1, 40, 2, 1, 16)
    plain, graph = (
        torch.autograd.grad(STREAMS["ssa"](leaves), leaves, create_graph=create) for create in (False, True)
    )
    for a, b in zip(plain, graph, strict=True):
        assert torch.equal(a, b)


@EACH
def test_documents_that_change_before_the_backward_pass_are_refused(stream):
    """A buffer that the next micro-batch reuses: its gradients would be those of other documents."""
    leaves, _ = inputs(2, 100, 4, 2, 16)
    starts = two_documents()
    out = STREAMS[stream](leaves, doc_starts=starts)
    starts[:, 60:] = 60
    if stream == "compressed":  # pooling has its own copy of where blocks lie
        out = out.square()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), leaves[:3])


def test_blocks_that_change_before_the_backward_pass_are_refused():
    leaves, _ = inputs(2, 100, 4, 2, 16)
    for stream in ("sparse", "ssa"):
        blocks = ssa_kernels.select_blocks(*leaves[:2], SPEC)
        out = STREAMS[stream](leaves, blocks=blocks)
        blocks.fill_(-1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(out.sum(), leaves[:3])


def test_documents_of_an_inference_mode_train():
    leaves, _ = inputs(2, 100, 4, 2, 16)
    with torch.inference_mode():
        starts = two_documents()
    assert all(x.isfinite().all() for x in torch.autograd.grad(STREAMS["ssa"](leaves, doc_starts=starts), leaves))
    assert layout.remembered(starts, "ends", lambda: 3) == 3


def test_one_layout_is_remembered_of_the_present_documents():
    starts, made = two_documents(), []

    def make():
        made.append(len(made))
        return made[-1]

    assert [layout.remembered(starts, "ends", make) for _ in range(3)] == [0, 0, 0]
    for step in range(1, 4):
        starts.zero_()
        assert layout.remembered(starts, "ends", make) == step
    assert layout.remembered(starts, "blocks 16", make) == 4
    assert len(starts._kernels_layout) == 2


def test_nothing_is_remembered_in_a_captured_graph(monkeypatch):
    """What was computed before the capture would be that of the warm-up's documents in every replay."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    starts = SimpleNamespace(is_cuda=True, is_inference=lambda: False, _version=0)
    assert layout.remembered(starts, "ends", lambda: "warm-up") == "warm-up"
    capturing = True
    assert layout.remembered(starts, "ends", lambda: "captured") == "captured"
    capturing = False
    assert layout.remembered(starts, "ends", lambda: "later") == "warm-up"


def odd(x: torch.Tensor, step: int, offset: int) -> torch.Tensor:
    """x in storage with gaps: every `step`-th value of a head, from `offset` on."""
    wide = torch.empty(*x.shape[:3], x.shape[3] * step + 2 * offset, dtype=x.dtype)
    return wide[..., offset : offset + x.shape[3] * step : step].copy_(x)


@pytest.mark.parametrize(("step", "offset"), [(2, 0), (1, 1), (1, 0)])
def test_the_vendors_kernel_gets_what_it_can_read(step, offset, monkeypatch):
    (q, k, v, _), _ = inputs(1, 40, 4, 2, 64, grad=False, dtype=torch.float16)
    seen = []
    monkeypatch.setattr(
        triton_backend.F,
        "scaled_dot_product_attention",
        lambda *tensors, **_: seen.extend(tensors) or tensors[0],
    )
    triton_backend._vendor(*(odd(x, step, offset) for x in (q, k, v)), 0.125)
    for got, x in zip(seen, (q, k, v), strict=True):
        assert torch.equal(got.transpose(1, 2), x)
        assert got.stride(3) == 1
        assert all(step % 8 == 0 for step in got.stride()[:3])
        assert got.data_ptr() % 16 == 0
    triton_backend._vendor(q, k, v, 0.125)
    assert seen[3].data_ptr() == q.data_ptr()
