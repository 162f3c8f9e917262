"""What an attention kind is: streams with a gate each, and the answers that model, planner, report and export ask for.

A kind names its streams; their forward passes, kept bytes and cost come from `streams.py`. A kind that only combines existing
streams needs no other code. This module and the kinds import no torch at import time, because `ssa plan` reads them.
"""

from abc import ABC
from typing import TYPE_CHECKING, ClassVar

from ssa_megatron.config.sections import Attention
from ssa_megatron.model.trunk import Trunk

if TYPE_CHECKING:
    from torch import Tensor

    from ssa_megatron.model.kinds.streams import AttentionInputs


class AttentionKind(ABC):
    """One attention kind. Subclasses set the class attributes and register themselves in `config.variants.KINDS`."""

    title: ClassVar[str]
    """Its name in reports: "Sparse Sparse Attention"."""
    training: ClassVar[str]
    """One clause for model cards: "trained on gated full attention"."""
    streams: ClassVar[tuple[str, ...]]
    """Streams that are computed, in the order of their gates: of `full`, `sparse`, `compressed`, `window`."""
    trunks: ClassVar[tuple[Trunk, ...]] = ("full",)
    """What a micro-batch's trunk may be. With more than one, `draw_trunk` decides; metrics count the sparse ones."""
    aligned: ClassVar[bool] = False
    """Whether layers return an alignment loss, which the objective weighs with `attention.alignment_weight`."""

    gates: ClassVar[int]
    """Gates per query head; one per stream unless the kind states another number."""
    routed: ClassVar[bool]
    """Whether blocks are selected for each token."""
    inference_mode: ClassVar[Trunk]
    """What an exported model runs unless it is told otherwise."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.gates = cls.__dict__.get("gates", len(cls.streams))
        cls.routed = "sparse" in cls.streams
        cls.inference_mode = "full" if "full" in cls.streams else "sparse"

    def __init__(self, attention: Attention):
        self.attention = attention

    def forward(self, x: "AttentionInputs", trunk: Trunk) -> "tuple[Tensor, Tensor | None]":
        """Gated output `[B, n, heads, D]`, and the alignment loss (fp32 scalar) of kinds that have one.

        The output is the sum of the streams, each times its own gate (arXiv 2511.20102, section 4; `docs/method.md`).
        """
        from ssa_megatron.model.kinds.streams import STREAMS, gated

        gates = x.gate.unflatten(-1, (-1, self.gates)).unbind(-1)  # head-major
        outputs = [
            gated(STREAMS[name].forward(x, self.attention), gate)
            for name, gate in zip(self.streams, gates, strict=True)
        ]
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total, None
