"""The trunk draw: which stream of a micro-batch feeds the next layer.

A pure function of (seed, step, global micro-batch index), so every tensor-, pipeline- and context-parallel rank, every
recomputation and every resumed run sees the same draw with no state to save (docs/method.md, "The trunk draw"; section 3.3 of
the paper).
"""

import hashlib
import struct
from typing import Literal

Trunk = Literal["full", "sparse"]


def draw_trunk(seed: int, step: int, microbatch: int, sparse_probability: float = 0.5) -> Trunk:
    """`step` counts optimizer steps from 0; `microbatch` numbers the step's micro-batches over all data-parallel ranks."""
    block = hashlib.blake2b(struct.pack("<QQQ", seed, step, microbatch), digest_size=8, person=b"ssa-trunk").digest()
    uniform = int.from_bytes(block, "little") / 2**64
    return "sparse" if uniform < sparse_probability else "full"
