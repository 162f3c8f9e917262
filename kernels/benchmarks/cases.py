"""What the benchmark runs: shapes, inputs of three kinds of selection, and every contender on them.

All contenders of a shape share one set of inputs and one selection, so that ratios compare like with like; each knows the FLOP
its stream must do (sparse counted as sparse), whatever its kernels do. What cannot run says why when it is called.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import ssa_kernels
from ssa_kernels.spec import BlockSpec
from ssa_kernels.triton import gate as triton_gate
from ssa_kernels.triton.backend import _Dense
from ssa_kernels.triton.dense import Dense
from ssa_kernels.triton.tiles import choose

SHAPES = {  # batch, tokens, Hq, Hkv, D
    "A 8k": (1, 8192, 32, 2, 64),
    "A 8k x4": (4, 8192, 32, 2, 64),
    "A 32k": (1, 32768, 32, 2, 64),
    "A 128k": (1, 131072, 32, 2, 64),
    "B 8k": (1, 8192, 32, 8, 128),
    "B 32k": (1, 32768, 32, 8, 128),
    "C 8k": (1, 8192, 32, 32, 128),
    "D 8k": (1, 8192, 64, 4, 128),
}
PICTURE = {f"A {n // 1024}k": (1, n, 32, 2, 64) for n in (1024 << i for i in range(8))}
LONG = 65536  # from here on, dense attention is timed forward only, and only as a baseline of the prefill
KINDS = {  # what neighbouring tokens select; Jaccard of their sets at 8k, and how many blocks back, are columns of the table
    "random": "iid queries and keys: neighbours share their own block and little else",
    "overlap": "queries of 256 neighbours nearly equal: they share blocks that lie anywhere",
    "local": "queries and keys drift together: neighbours share the blocks just before them",
}
SPEC = BlockSpec()


@dataclass
class Sample:
    """Inputs of one shape, its documents, and the selection its contenders are given or will make."""

    name: str
    kind: str
    leaves: list[Tensor]  # q, k, v, gate
    upstream: Tensor
    documents: dict[str, Tensor | None]  # "none"; "one": a single document, given; "1k": documents of N / 8 tokens
    blocks: dict[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        (batch, n, h_q, dim), h_kv = self.leaves[0].shape, self.leaves[1].shape[2]
        return batch, n, h_q, h_kv, dim

    def selected(self, docs: str) -> Tensor:
        if docs not in self.blocks:
            q, k = (x.detach() for x in self.leaves[:2])
            self.blocks[docs] = ssa_kernels.select_blocks(q, k, SPEC, doc_starts=self.documents[docs], backend="triton")
        return self.blocks[docs]


def make(name: str, kind: str, shapes: dict = SHAPES) -> Sample:
    batch, n, h_q, h_kv, dim = shapes[name]
    rng = torch.Generator("cuda").manual_seed(0)

    def normal(rows, heads):
        return torch.randn(batch, rows, heads, dim, device="cuda", generator=rng)

    q, upstream = normal(n, h_q), normal(n, h_q)
    k, v = normal(n, h_kv), normal(n, h_kv)
    if kind == "overlap":
        q = 0.06 * q + 0.998 * normal(-(-n // 256), h_q).repeat_interleave(256, 1)[:, :n]
    elif kind == "local":
        knots, place = normal(n // 256 + 2, h_kv), torch.arange(n, device="cuda") / 256
        left, part = place.long(), place.frac()[None, :, None, None]
        drift = torch.lerp(knots[:, left], knots[:, left + 1], part)
        k, q = k + drift, 0.7 * q + 0.7 * drift.repeat_interleave(h_q // h_kv, 2)
    gate = torch.rand(batch, n, h_q, device="cuda", generator=rng)
    place = torch.arange(n, device="cuda", dtype=torch.int32).expand(batch, -1)
    docs = {"none": None, "one": torch.zeros_like(place).contiguous(), "1k": (place // 1024 * 1024).contiguous()}
    return Sample(name, kind, [x.bfloat16().requires_grad_() for x in (q, k, v, gate)], upstream.bfloat16(), docs)


def overlap(blocks: Tensor) -> tuple[float, float]:
    """(Jaccard of the sets of neighbouring tokens, blocks between a token and what it selects), past the first 1024 tokens."""
    blocks = blocks[:1, min(1024, blocks.shape[1] // 2) :]
    a, b = blocks[:, :-1], blocks[:, 1:]
    both = ((a[..., :, None] == b[..., None, :]) & (a >= 0)[..., None]).sum((-1, -2)).float()
    jaccard = (both / ((a >= 0).sum(-1) + (b >= 0).sum(-1) - both)).mean()
    back = (blocks[..., :1] - blocks[..., 1:])[blocks[..., 1:] >= 0].float().mean()
    return float(jaccard), float(back)


@dataclass(frozen=True)
class Contender:
    """One row: `call` takes q, k, v, gate; `flops` are (forward, backward); `truth` is the stream that judges it, "" for none."""

    what: str
    call: Callable
    truth: str
    flops: tuple[float, float]
    docs: str = "none"
    trunk: str = "full"
    backward: bool = True


def flops(sample: Sample, docs: str) -> dict[str, tuple[float, float]]:
    """FLOP each stream must do: two products forward and five backward per visible pair, one product per pooled key."""
    batch, n, h_q, _, dim = sample.shape
    starts, place = sample.documents[docs], torch.arange(n, device="cuda")
    seen = (place - (0 if starts is None else starts.long()) + 1).expand(batch, -1)  # keys of each token's full stream
    blocks, size = sample.selected(docs), SPEC.block_size
    keys = ((blocks >= 0).sum(-1) - 1) * size + ((seen - 1) % size + 1)[..., None]
    unit = 2 * dim * h_q
    full, sparse = float(seen.sum()) * unit, float(keys.double().mean(-1).sum()) * unit
    route = float((seen // size).sum()) * unit
    return {
        "full": (2 * full, 5 * full), "sparse": (2 * sparse + route, 5 * sparse), "select": (route, 0.0),
        "given": (2 * sparse, 5 * sparse), "ssa": (2 * full + 2 * sparse + route, 5 * full + 5 * sparse),
    }  # fmt: skip


def contenders(sample: Sample, flex: bool = False, whole: bool = False) -> list[Contender]:
    """Baselines first: later rows are compared with them. `whole`: dense attention both ways at any length."""
    need, packed = flops(sample, "none"), flops(sample, "1k")
    long = sample.shape[1] >= LONG and not whole
    rows = [
        Contender("SDPA cudnn", sdpa(SDPBackend.CUDNN_ATTENTION), "full", need["full"], backward=not long),
        Contender("SDPA flash", sdpa(SDPBackend.FLASH_ATTENTION), "full", need["full"], backward=not long),
    ]
    if not long:
        rows += [
            Contender("our dense", dense(sample, "none"), "full", need["full"]),
            Contender("our dense, documents of 1k", dense(sample, "1k"), "full", packed["full"], docs="1k"),
        ]
    rows += [
        Contender("sparse with routing", sparse, "sparse", need["sparse"]),
        Contender("routing", route, "select", need["select"], backward=False),
        Contender("SSA, trunk full", ssa(sample, "full", "none"), "ssa", need["ssa"]),
        Contender("SSA, trunk sparse", ssa(sample, "sparse", "none"), "ssa", need["ssa"], trunk="sparse"),
    ]
    if not long:
        rows += [
            Contender("SSA, one document given", ssa(sample, "full", "one"), "ssa", need["ssa"], docs="one"),
            Contender("SSA, documents of 1k", ssa(sample, "full", "1k"), "ssa", packed["ssa"], docs="1k"),
            Contender("parallel_nsa, given blocks", parallel_nsa(sample), "sparse", need["given"]),
        ]
    if flex and not long:
        rows += [
            Contender("FlexAttention", flex_attention(sample, "none"), "full", need["full"]),
            Contender(
                "FlexAttention, documents of 1k", flex_attention(sample, "1k"), "full", packed["full"], docs="1k"
            ),
        ]
    return rows


def sdpa(backend: SDPBackend) -> Callable:
    def call(q, k, v, gate):
        with sdpa_kernel(backend):
            heads_first = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=q.shape[2] != k.shape[2])
        return out.transpose(1, 2)

    return call


def dense(sample: Sample, docs: str) -> Callable:
    """Our kernel even where the backend would choose the vendor's."""

    def call(q, k, v, gate):
        return _Dense.apply(q, k, v, q.shape[3] ** -0.5, Dense(k.shape[1], doc_starts=sample.documents[docs]))

    return call


def sparse(q, k, v, gate):
    return ssa_kernels.sparse_attention(q, k, v, SPEC, backend="triton")


def route(q, k, v, gate):
    return ssa_kernels.select_blocks(q, k, SPEC, backend="triton")


def ssa(sample: Sample, trunk: str, docs: str) -> Callable:
    def call(q, k, v, gate):
        starts = sample.documents[docs]
        return ssa_kernels.ssa_attention(q, k, v, gate, SPEC, trunk=trunk, doc_starts=starts, backend="triton")

    return call


def parallel_nsa(sample: Sample) -> Callable:
    """fla-core's block-sparse attention, given our blocks; it needs groups of at least 16 and an index >= N for "none"."""
    indices: list[Tensor] = []

    def call(q, k, v, gate):
        from fla.ops.nsa.parallel import parallel_nsa as theirs

        if not indices:
            blocks = sample.selected("none")
            indices.append(torch.where(blocks < 0, q.shape[1], blocks).sort(-1).values)
        return theirs(q, k, v, block_indices=indices[0], block_counts=SPEC.block_count, block_size=SPEC.block_size)

    return call


def flex_attention(sample: Sample, docs: str) -> Callable:
    compiled: list[Callable] = []

    def call(q, k, v, gate):
        if not compiled:
            compiled.append(_flex(sample, docs))
        return compiled[0](*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return call


def _flex(sample: Sample, docs: str) -> Callable:
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as theirs

    if os.environ.get("TORCH_COMPILE_DISABLE") == "1":
        raise RuntimeError("TORCH_COMPILE_DISABLE=1 is set")
    batch, n, h_q, h_kv, _ = sample.shape
    starts = sample.documents[docs]

    def causal(b, h, t, j):
        return t >= j

    def inside(b, h, t, j):
        return (t >= j) & (starts[b, t] == starts[b, j])

    rule, rows = (causal, None) if starts is None else (inside, batch)
    mask = create_block_mask(rule, rows, None, n, n, device="cuda", _compile=True)
    compiled = torch.compile(theirs, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=h_q != h_kv)


def gate_and_loss(sample: Sample) -> tuple[Callable, Callable]:
    """The fused gate and loss alone, forward and backward, on tensors of the shape: what SSA spends outside attention."""
    q, gate, other = sample.leaves[0].detach(), sample.leaves[3].detach(), sample.upstream
    one, rows = torch.ones((), device="cuda"), choose(q).gate_rows

    def forward():
        triton_gate.gate_forward(q, other, gate, "full", q.numel(), rows)

    def backward():
        triton_gate.gate_backward(q, other, gate, other, one, "full", q.numel(), rows)

    return forward, backward
