"""What an attention kind is: streams and their gates, and the answers that model, planner, report and export ask for.

A kind names its streams; their forward passes, kept bytes and cost come from `streams.py`. A kind that only combines existing
streams needs no other code. This module and the kinds import no torch at import time, because `ssa plan` reads them.
"""

from abc import ABC
from typing import TYPE_CHECKING, Any, ClassVar

from ssa_megatron.config.sections import Attention
from ssa_megatron.errors import ConfigError
from ssa_megatron.model.trunk import Trunk

if TYPE_CHECKING:
    from torch import Tensor

    from ssa_megatron.model.kinds.streams import AttentionInputs
    from ssa_megatron.planning.hardware import Hardware
    from ssa_megatron.planning.rank_shapes import RankShapes

GATE_BYTES = 40  # moved by unfused element-wise kernels per gate and query channel, forward and backward


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
        if not isinstance(getattr(cls, "streams", None), tuple):
            raise TypeError(f"{cls.__name__}: an attention kind states its streams, a tuple of names")
        derived = {
            "gates": len(cls.streams),
            "routed": "sparse" in cls.streams,
            "inference_mode": "full" if "full" in cls.streams else "sparse",
        }
        stated = {name: cls.__dict__[name] for name in derived if name in cls.__dict__}
        cls._stated = {**cls._stated, **stated}  # a subclass keeps what its base states, and derives the rest again
        for name, value in {**derived, **cls._stated}.items():
            setattr(cls, name, value)

    _stated: ClassVar[dict[str, Any]] = {}

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

    def kept_bytes(self, c: "RankShapes") -> dict[str, int]:
        """Bytes that autograd keeps of the attention core in one layer for one micro-batch, by item of a memory plan."""
        from ssa_megatron.model.kinds.streams import STREAMS, input_bytes

        streams = [STREAMS[name] for name in self.streams]
        items = {"q, k, v": input_bytes(streams, c, self.attention), "gate": 4 * c.gates * c.tokens}
        for stream in streams:
            items[stream.item] = items.get(stream.item, 0) + stream.kept_bytes(c, self.attention)
        return items

    def seconds(self, c: "RankShapes", gpu: "Hardware") -> float:
        """Seconds per token of the attention core in one layer, forward and backward, on this rank's heads."""
        from ssa_megatron.model.kinds.streams import STREAMS

        streams = [stream.seconds(c, gpu, self.attention) for name, stream in STREAMS.items() if name in self.streams]
        return sum(streams) + self.gates * c.query * GATE_BYTES / gpu.bandwidth

    @classmethod
    def exported_streams(cls) -> tuple[str, ...]:
        """What an exported folder computes: a stream per gate, by the names of `hf/bundle/configuration_ssa.py`.

        Raises ConfigError for a kind whose output is not the gated sum of its streams.
        """
        if cls.forward is not AttentionKind.forward or cls.gates != len(cls.streams):
            raise ConfigError(
                f"attention {cls.title!r} cannot be exported: it has a forward of its own",
                remedy="define exported_streams in its class, with streams that the exported files compute",
                id="kind-not-exportable",
            )
        return cls.streams
