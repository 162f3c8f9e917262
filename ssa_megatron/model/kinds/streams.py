"""The streams that attention kinds are made of. A stream takes rotated q, k, v and gives an output without its gate.

The mathematics is in `ssa_kernels`. Like the kinds, this module imports no torch at import time, because `ssa plan` reads it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssa_megatron.config.sections import Attention

if TYPE_CHECKING:
    from torch import Tensor

    from ssa_kernels import BlockSpec


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
    blocks: dict[str, "Tensor"]
    """`{"blocks": int32 [B, n, kv_heads, block_count]}` where the layer has selected them already, else empty: where several
    tensor-parallel ranks share a query group, selection needs the queries of all of them."""


class Stream(ABC):
    """One stream of an attention kind."""

    @abstractmethod
    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        """`[B, n, heads, D]`, without the gate."""


class Full(Stream):
    """Causal softmax attention over the whole document."""

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.full_attention(x.q, x.k, x.v, **x.where)


class Sparse(Stream):
    """Attention over the selected blocks."""

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.sparse_attention(x.q, x.k, x.v, x.spec, **x.blocks, **x.where)


class Compressed(Stream):
    """Attention over pooled keys and values, one per complete block."""

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.compressed_attention(x.q, x.k, x.v, x.spec, **x.where)


class Window(Stream):
    """Attention over the last `attention.window` tokens, own included."""

    def forward(self, x: AttentionInputs, attention: Attention) -> "Tensor":
        import ssa_kernels

        return ssa_kernels.window_attention(x.q, x.k, x.v, attention.window, **x.where)


STREAMS: dict[str, Stream] = {"full": Full(), "sparse": Sparse(), "compressed": Compressed(), "window": Window()}


def gated(output_bnhd: "Tensor", gate_bnh: "Tensor") -> "Tensor":
    """`output * gate`, the product in fp32, in the output's dtype."""
    return (output_bnhd * gate_bnh.unsqueeze(-1)).to(output_bnhd.dtype)
