"""The streams that attention kinds are made of. A stream takes rotated q, k, v and gives an output without its gate.

The mathematics is in `ssa_kernels`. Each stream also states what it costs, because `ssa plan` sums these figures; a test
compares the bytes with those that autograd keeps. Like the kinds, this module imports no torch at import time.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ssa_megatron.config.sections import Attention

if TYPE_CHECKING:
    from torch import Tensor

    from ssa_kernels import BlockSpec
    from ssa_megatron.planning.hardware import Hardware
    from ssa_megatron.planning.rank_shapes import RankShapes

LSE_PAD = 128  # kernels/ssa_kernels/triton/dense.py
EDGE_KEYS = 340  # of tiles of our dense kernel that cross an edge of what a row attends to: computed and masked


@dataclass(frozen=True)
class AttentionInputs:
    """One layer's attention on this rank: n of the row's N tokens, this rank's heads."""

    q: "Tensor"
    """`[B, n, heads, D]`, rotated."""
    k: "Tensor"
    """`[B, N, kv_heads, D]`, rotated."""
    v: "Tensor"
    """`[B, N, kv_heads, D]`."""
    gate: "Tensor"
    """fp32 `[B, n, heads * gates]` in (0, 1)."""
    spec: "BlockSpec"
    where: dict[str, Any]
    """Keyword arguments that every function of `ssa_kernels` takes: `doc_starts`, `query_index`, `backend`."""
    blocks: dict[str, Any]
    """`{"blocks": int32 [B, n, kv_heads, block_count]}` where the layer has selected them already, else empty: where several
    tensor-parallel ranks share a query group, selection needs the queries of all of them."""


class Stream(ABC):
    """One stream of an attention kind."""

    item: ClassVar[str]
    """The line of a memory plan that its kept bytes are added to."""
    pooled: ClassVar[bool] = False
    """Whether it reads pooled keys and values, rather than k and v themselves."""

    @abstractmethod
    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        """`[B, n, heads, D]`, without the gate."""

    @abstractmethod
    def kept_bytes(self, c: "RankShapes", attention: Attention) -> int:
        """Bytes that autograd keeps in one layer for one micro-batch, in addition to `input_bytes`."""

    @abstractmethod
    def seconds(self, c: "RankShapes", gpu: "Hardware", attention: Attention) -> float:
        """Seconds per token in one layer, forward and backward, on this rank's heads."""


class Full(Stream):
    """Causal softmax attention over the whole document."""

    item = "full stream"

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.full_attention(x.q, x.k, x.v, **x.where)

    def kept_bytes(self, c: "RankShapes", attention: Attention) -> int:
        again = 2 * c.element * c.query * c.tokens if c.vendor else 0  # the vendor's kernel keeps two more tensors
        return _dense_bytes(c, attention) + again

    def seconds(self, c: "RankShapes", gpu: "Hardware", attention: Attention) -> float:
        return dense_seconds(c, gpu, c.document, vendor=c.vendor)


class Sparse(Stream):
    """Attention over the selected blocks."""

    item = "sparse stream"

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.sparse_attention(x.q, x.k, x.v, x.spec, **x.blocks, **x.where)

    def kept_bytes(self, c: "RankShapes", attention: Attention) -> int:
        output, lse = c.element * c.query * c.tokens, 4 * c.heads * c.tokens
        return output + lse + 4 * c.kv_heads * attention.block_count * c.tokens

    def seconds(self, c: "RankShapes", gpu: "Hardware", attention: Attention) -> float:
        selected = c.kv_heads * selected_channels(c, attention) * gpu.select
        return routing_seconds(c, gpu) + selected + c.query * gpu.stream_seconds(c.head_dim)


class Compressed(Stream):
    """Attention over pooled keys and values, one per complete block."""

    item = "compressed, window"
    pooled = True

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.compressed_attention(x.q, x.k, x.v, x.spec, **x.where)

    def kept_bytes(self, c: "RankShapes", attention: Attention) -> int:
        return _dense_bytes(c, attention)

    def seconds(self, c: "RankShapes", gpu: "Hardware", attention: Attention) -> float:
        return dense_seconds(c, gpu, c.document / attention.block_size)


class Window(Stream):
    """Attention over the last `attention.window` tokens, own included."""

    item = "compressed, window"

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.window_attention(x.q, x.k, x.v, attention.window, **x.where)

    def kept_bytes(self, c: "RankShapes", attention: Attention) -> int:
        return _dense_bytes(c, attention)

    def seconds(self, c: "RankShapes", gpu: "Hardware", attention: Attention) -> float:
        return dense_seconds(c, gpu, 2 * min(attention.window, c.document))


STREAMS: dict[str, Stream] = {"full": Full(), "sparse": Sparse(), "window": Window(), "compressed": Compressed()}
"""By name, in the order in which a plan adds their seconds."""


def gated(output_bnhd: "Tensor", gate_bnh: "Tensor") -> "Tensor":
    """`output * gate`, the product in fp32, in the output's dtype."""
    return (output_bnhd * gate_bnh.unsqueeze(-1)).to(output_bnhd.dtype)


def input_bytes(streams: Sequence[Stream], c: "RankShapes", attention: Attention) -> int:
    """Bytes of q, k and v that autograd keeps for `streams`, one kernel call per stream.

    v is a view of the whole projection, and only a copy releases the projection. The Triton backend copies what is not
    contiguous: v always, q and k when a micro-batch has several rows. Pooling keeps k, the projection and two gather indices.
    """
    q, k = c.element * c.query * c.tokens, c.element * c.key * c.key_tokens
    projection = c.element * (c.query + 2 * c.key) * c.tokens
    direct, pooled = sum(not stream.pooled for stream in streams), any(stream.pooled for stream in streams)
    if attention.backend == "torch":
        kept = q + k + projection
    else:
        kept = q * (len(streams) if c.rows > 1 else 1)
        kept += k * (direct + pooled if c.rows > 1 else 1) + k * direct + projection * pooled
    if pooled:
        kept += 16 * c.key_tokens + 2 * (k + c.key_tokens) // attention.block_size
    return kept


def _dense_bytes(c: "RankShapes", attention: Attention) -> int:
    """Output and fp32 log-sum-exp of one call of the dense kernel, which pads the rows of the latter."""
    row = c.tokens // c.rows
    padded = row if attention.backend == "torch" else -(-row // LSE_PAD) * LSE_PAD
    return c.element * c.query * c.tokens + 4 * c.heads * c.rows * padded


def dense_seconds(c: "RankShapes", gpu: "Hardware", keys: float, *, vendor: bool = False) -> float:
    """Seconds per token of the dense kernel over rows of `keys` keys: 3.5 times the forward's two products over half of them."""
    rate, edge = (1.0, 0) if vendor else (gpu.own, EDGE_KEYS)
    return 3.5 * 2 * (keys + edge) * c.query / (rate * gpu.dense_flops(c.head_dim))


def routing_seconds(c: "RankShapes", gpu: "Hardware") -> float:
    """Seconds per token of scoring and selecting blocks."""
    return c.heads * c.document * gpu.route + c.kv_heads * gpu.pick


def selected_channels(c: "RankShapes", attention: Attention) -> int:
    """Key channels that one token attends to in the sparse stream, per key/value head."""
    return min(attention.block_size * attention.block_count, c.document) * c.head_dim
