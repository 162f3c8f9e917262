"""`ssa`: full and sparse streams behind one gate, aligned with each other; the trunk follows one of them (arXiv 2511.20102)."""

from dataclasses import replace
from typing import TYPE_CHECKING

from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.kinds.base import AttentionKind
from ssa_megatron.model.trunk import Trunk

if TYPE_CHECKING:
    from torch import Tensor

    from ssa_megatron.model.kinds.streams import AttentionInputs
    from ssa_megatron.planning.hardware import Hardware
    from ssa_megatron.planning.rank_shapes import RankShapes

# Copies of constants of kernels/ssa_kernels/triton/tiles.py, which imports torch; a test compares them
DUAL_ALONE, DUAL_DOCUMENTS = 128, 256


@KINDS.register("ssa")
class SSA(AttentionKind):
    title = "Sparse Sparse Attention"
    training = "trained on full and sparse attention with the alignment loss between the two"
    streams = ("full", "sparse")
    trunks = ("full", "sparse")
    aligned = True
    gates = 1

    def forward(self, x: "AttentionInputs", trunk: Trunk) -> "tuple[Tensor, Tensor | None]":
        """Both streams, routing, gate and alignment loss in one call, so that the kernels can share work between the streams."""
        import ssa_kernels

        return ssa_kernels.ssa_attention(x.q, x.k, x.v, x.gate, x.spec, trunk=trunk, **x.blocks, **x.where)

    def one_pass(self, c: "RankShapes") -> bool:
        """Whether both streams share one pass over the keys, as in kernels/ssa_kernels/triton/tiles.py: dual()."""
        a, group = self.attention, c.heads // c.kv_heads
        fits = a.backend != "torch" and c.key_tokens == c.tokens and group <= 8
        fits = fits and a.block_size in (16, 32, 64, 128) and c.head_dim <= 128
        bound = (DUAL_DOCUMENTS if c.document < c.row else DUAL_ALONE) * a.block_size * a.block_count
        return fits and c.row * group <= bound

    def kept_bytes(self, c: "RankShapes") -> dict[str, int]:
        """One call has one copy of q, k and v for both streams, and its one pass runs in our kernel, not the vendor's."""
        from ssa_megatron.model.kinds.streams import STREAMS, input_bytes

        copied = c.rows > 1 and self.attention.backend != "torch"  # the gate, heads first and contiguous
        items = super().kept_bytes(replace(c, vendor=c.vendor and not self.one_pass(c)))
        items["q, k, v"] = input_bytes([STREAMS["full"]], c, self.attention)
        items["gate"] *= 2 if copied else 1
        return items

    def seconds(self, c: "RankShapes", gpu: "Hardware") -> float:
        from ssa_megatron.model.kinds.streams import STREAMS, dense_seconds, routing_seconds, selected_channels

        a = self.attention
        if self.one_pass(c):
            gathered = c.heads * selected_channels(c, a) * gpu.gather
            both = gpu.one_pass * dense_seconds(c, gpu, c.document) + routing_seconds(c, gpu) + gathered
        else:
            both = STREAMS["full"].seconds(c, gpu, a) + STREAMS["sparse"].seconds(c, gpu, a)
        return both + c.query * gpu.gate

    @classmethod
    def exported_streams(cls) -> tuple[str, ...]:
        return ("trunk",)
