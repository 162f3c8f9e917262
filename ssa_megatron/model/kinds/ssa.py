"""`ssa`: full and sparse streams behind one gate, aligned with each other; the trunk follows one of them (arXiv 2511.20102)."""

from typing import TYPE_CHECKING

from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.kinds.base import AttentionKind
from ssa_megatron.model.trunk import Trunk

if TYPE_CHECKING:
    from torch import Tensor

    from ssa_megatron.model.kinds.streams import AttentionInputs


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
