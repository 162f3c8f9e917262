"""`full`: gated full attention, the baseline."""

from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.kinds.base import AttentionKind


@KINDS.register("full")
class Full(AttentionKind):
    title = "Full attention"
    training = "trained on gated full attention"
    streams = ("full",)
