"""The words of the interface: which blocks are chosen (`BlockSpec`), what is measured, and how a wrong argument is
refused.

Plain data and one error type, so that every backend and every caller can import it at no cost.
It refuses nothing by itself; `checks.py` does.
"""

import re
from typing import NamedTuple

from torch import Tensor


class KernelArgumentError(ValueError):
    """An argument of a public function is wrong: its name, the value it got and what is expected.

    `id` is stable, for tests and scripts: the name without indices (`q.shape` for `q.shape[2] (Hq)`).
    """

    def __init__(self, name: str, got: object, expected: str):
        super().__init__(name, got, expected)
        self.id = re.split(r"[\[ ]", name)[0]

    def __str__(self) -> str:
        return "{}: got {}, expected {}".format(*self.args)


class BlockSpec(NamedTuple):
    """Which blocks a token may attend to in the sparse stream (arXiv 2511.20102, section 3).

    block_size: tokens in a block (paper: 16).
    block_count: blocks selected for a token and KV group, its own block included (paper: 16).
    topk: "exact", or "reference" (formerly "authors"), which reproduces the selection of the authors' released kernel
        (block size and count 16): past the first 16 blocks, the best 8 of all blocks before the current chunk of 16
        blocks, and the best 8 of that chunk, the own block included.
    """

    block_size: int = 16
    block_count: int = 16
    topk: str = "exact"

    @property
    def reference(self) -> bool:
        """Whether `topk` is "reference", in either spelling."""
        return self.topk in ("reference", "authors")


class AttentionStatistics(NamedTuple):
    """What the paper reports of a layer (section 5): means over the B*Nq tokens of a call.

    sparsity: fp32 [Hq], full-attention probability mass inside the selected blocks, 0 to 1.
    entropy: fp32 [Hq], entropy of the full-attention distribution, nats.
    """

    sparsity: Tensor
    entropy: Tensor
