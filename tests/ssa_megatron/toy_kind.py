"""An attention kind that exists in tests only: full and window streams, a gate each."""

from collections.abc import Iterator
from contextlib import contextmanager

from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.kinds.base import AttentionKind

NAME = "full-window"


class FullWindow(AttentionKind):
    title = "Full and window attention"
    training = "trained on full and window streams, each with its own gate"
    streams = ("full", "window")


@contextmanager
def registered() -> Iterator[type[AttentionKind]]:
    """Inside, recipes may name the kind."""
    KINDS.register(NAME)(FullWindow)
    try:
        yield FullWindow
    finally:
        KINDS.unregister(NAME)
