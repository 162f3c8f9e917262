"""`moba`: gated block-sparse attention alone (Mixture of Block Attention, as arXiv 2511.20102 trains it)."""

from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.kinds.base import AttentionKind


@KINDS.register("moba")
class MoBA(AttentionKind):
    title = "Mixture of Block Attention"
    training = "trained on gated block-sparse attention alone"
    streams = ("sparse",)
