"""Argument checks of the public functions.

Every error names the argument, what it was given and what is expected, and no check ever synchronises a GPU: shapes,
dtypes and devices are always checked, values (`doc_starts`, `query_index`, `blocks`) only when the tensor lies on the CPU.
It refuses what no backend can run; what one backend cannot run is that backend's to refuse.
"""

import torch
from torch import Tensor

from ssa_kernels.spec import BlockSpec, KernelArgumentError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def need(condition: bool, name: str, got, expected: str) -> None:
    if not condition:
        raise KernelArgumentError(name, got, expected)


def whole(value, least: int) -> bool:
    """An integer of at least `least`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_spec(spec: BlockSpec) -> None:
    need(isinstance(spec, BlockSpec), "spec", type(spec).__name__, "a ssa_kernels.BlockSpec")
    for name in ("block_size", "block_count"):
        value = getattr(spec, name)
        need(whole(value, 1), f"spec.{name}", value, "an integer of at least 1")
    need(spec.topk == "exact" or spec.reference, "spec.topk", repr(spec.topk), "'exact' or 'reference'")
    if spec.reference:
        need(
            spec.block_size == 16 and spec.block_count == 16,
            "spec.topk",
            f"{spec.topk!r} with block_size={spec.block_size}, block_count={spec.block_count}",
            "block_size=16 and block_count=16, the one shape that the reference selection is defined for; use topk='exact'",
        )


def _check_heads(name: str, x: Tensor) -> None:
    need(isinstance(x, Tensor), name, type(x).__name__, "a tensor [B, N, H, D]")
    dense = x.layout == torch.strided and not x.is_nested
    need(dense, f"{name}.layout", "nested" if x.is_nested else x.layout, "a dense (strided) tensor [B, N, H, D]")
    need(x.dim() == 4 and min(x.shape) >= 1, f"{name}.shape", tuple(x.shape), "[B, N, H, D], no size 0")
    need(x.dtype in FLOATS, f"{name}.dtype", x.dtype, "float16, bfloat16, float32 (or float64 on the torch backend)")


def check_qkv(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    """q [B, Nq, Hq, D]; k and v [B, N, Hkv, D]; one dtype, one device, Hq a multiple of Hkv."""
    _check_heads("q", q)
    for name, x in (("k", k), ("v", v)):
        if x is None:
            continue
        _check_heads(name, x)
        need(x.dtype == q.dtype, f"{name}.dtype", x.dtype, f"q's dtype {q.dtype}")
        need(x.device == q.device, f"{name}.device", x.device, f"q's device {q.device}")
        need(x.shape[0] == q.shape[0], f"{name}.shape[0]", x.shape[0], f"q's batch size {q.shape[0]}")
        need(x.shape[3] == q.shape[3], f"{name}.shape[3]", x.shape[3], f"q's head dimension {q.shape[3]}")
    if v is not None:
        need(v.shape == k.shape, "v.shape", tuple(v.shape), f"k's shape {tuple(k.shape)}")
    need(q.shape[2] % k.shape[2] == 0, "q.shape[2] (Hq)", q.shape[2], f"a multiple of k's {k.shape[2]} heads (Hkv)")


def check_doc_starts(doc_starts: Tensor | None, k: Tensor) -> None:
    """doc_starts int32 [B, N]: the index at which each token's own document begins."""
    if doc_starts is None:
        return
    need(isinstance(doc_starts, Tensor), "doc_starts", type(doc_starts).__name__, "an int32 tensor [B, N]")
    need(doc_starts.dtype == torch.int32, "doc_starts.dtype", doc_starts.dtype, "int32")
    expected = (k.shape[0], k.shape[1])
    need(tuple(doc_starts.shape) == expected, "doc_starts.shape", tuple(doc_starts.shape), f"[B, N] = {list(expected)}")
    need(doc_starts.device == k.device, "doc_starts.device", doc_starts.device, f"k's device {k.device}")
    if doc_starts.device.type == "cpu":
        position = torch.arange(k.shape[1], dtype=torch.int32)
        new = doc_starts == position
        same = torch.zeros_like(new)
        same[:, 1:] = doc_starts[:, 1:] == doc_starts[:, :-1]
        wrong = ~(new | same)
        if bool(wrong.any()):
            b, t = (int(i) for i in wrong.nonzero()[0])
            expected = f"{t} (a new document) or the value of the token before (the same document)"
            need(False, f"doc_starts[{b}, {t}]", int(doc_starts[b, t]), expected if t else "0")


def check_query_index(query_index: Tensor | None, q: Tensor, k: Tensor) -> None:
    """query_index int32 [Nq]: the place of each query row in the key sequence."""
    n_q, n_k = q.shape[1], k.shape[1]
    if query_index is None:
        need(n_q == n_k, "q.shape[1]", n_q, f"k's length {n_k} (or pass query_index)")
        return
    need(isinstance(query_index, Tensor), "query_index", type(query_index).__name__, "an int32 tensor [Nq]")
    need(query_index.dtype == torch.int32, "query_index.dtype", query_index.dtype, "int32")
    need(tuple(query_index.shape) == (n_q,), "query_index.shape", tuple(query_index.shape), f"[Nq] = [{n_q}]")
    need(query_index.device == q.device, "query_index.device", query_index.device, f"q's device {q.device}")
    if query_index.device.type == "cpu":
        low, high = int(query_index.min()), int(query_index.max())
        need(
            low >= 0 and high < n_k, "query_index", f"values {low}..{high}", f"0..{n_k - 1}, places in the key sequence"
        )


def check_scale(scale: float | None, q: Tensor) -> float:
    """The softmax scale: D**-0.5 unless given."""
    if scale is None:
        return q.shape[3] ** -0.5
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    need(number and 0 < scale < float("inf"), "scale", scale, "a positive finite number or None")
    return float(scale)


def check_gate(gate: Tensor, q: Tensor) -> None:
    need(isinstance(gate, Tensor), "gate", type(gate).__name__, "a tensor [B, Nq, Hq]")
    need(gate.shape == q.shape[:3], "gate.shape", tuple(gate.shape), f"[B, Nq, Hq] = {list(q.shape[:3])}")
    need(gate.dtype in FLOATS, "gate.dtype", gate.dtype, "a floating type")
    need(gate.device == q.device, "gate.device", gate.device, f"q's device {q.device}")


def check_blocks(blocks: Tensor, q: Tensor, k: Tensor, size: int) -> None:
    """Block numbers as `select_blocks` gives them; the GPU kernels would read what a number too large points at, and weigh a
    block twice that is listed twice."""
    need(isinstance(blocks, Tensor), "blocks", type(blocks).__name__, "an int32 tensor [B, Nq, Hkv, block_count]")
    need(blocks.dtype == torch.int32, "blocks.dtype", blocks.dtype, "int32")
    expected = (q.shape[0], q.shape[1], k.shape[2])
    need(
        blocks.dim() == 4 and tuple(blocks.shape[:3]) == expected and blocks.shape[3] >= 1,
        "blocks.shape",
        tuple(blocks.shape),
        f"[B, Nq, Hkv, block_count] = [{expected[0]}, {expected[1]}, {expected[2]}, >= 1]",
    )
    need(blocks.device == q.device, "blocks.device", blocks.device, f"q's device {q.device}")
    if blocks.device.type == "cpu":
        low, high, most = int(blocks.min()), int(blocks.max()), (k.shape[1] - 1) // size
        need(
            low >= -1 and high <= most,
            "blocks",
            f"values {low}..{high}",
            f"-1 (none) or 0..{most}, the blocks of the row",
        )
        ascending = blocks.sort(-1).values
        twice = (ascending[..., 1:] == ascending[..., :-1]) & (ascending[..., 1:] >= 0)
        if bool(twice.any()):
            b, row, h, i = (int(x) for x in twice.nonzero()[0])
            got = f"block {int(ascending[b, row, h, i])} twice"
            need(False, f"blocks[{b}, {row}, {h}]", got, "every block once (and -1 for none)")
