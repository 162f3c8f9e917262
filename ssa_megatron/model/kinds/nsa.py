"""`nsa`: compressed, selected and window streams, a gate each (Native Sparse Attention, as arXiv 2511.20102 trains it)."""

from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.kinds.base import AttentionKind


@KINDS.register("nsa")
class NSA(AttentionKind):
    title = "Native Sparse Attention"
    training = "trained on compressed, selected and window streams, each with its own gate"
    streams = ("compressed", "sparse", "window")
