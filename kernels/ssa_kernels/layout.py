"""Where blocks lie in a packed row: documents, blocks and the slots that hold pooled keys, all without a host
synchronisation.

Block `j` of the document that begins at `s` covers positions `s + j*b .. s + (j+1)*b - 1` and lives in slot `s // b
+ j`; two *complete* blocks never share a slot (they are `b` apart), so `ceil(N / b)` slots hold every pooled key of
a packed row. A last, partial block has a slot number too, which a complete block of a later document may share; it
is never pooled.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def remembered(doc_starts_bn: Tensor, name: str, make: Callable[[], T]) -> T:
    """make(), kept on the tensor itself: every layer of a micro-batch asks the same of the same `doc_starts`.

    One result a name, of the tensor's present contents: a buffer that each step overwrites keeps no more than one. Nothing
    is kept where contents are not known to be the same: an inference tensor counts no changes, and a CUDA graph that is
    captured with what was computed before, or keeps what its replays overwrite, would be wrong for the next documents.
    """
    captured = doc_starts_bn.is_cuda and torch.cuda.is_current_stream_capturing()
    if captured or doc_starts_bn.is_inference():
        return make()
    kept = doc_starts_bn.__dict__.setdefault("_kernels_layout", {})
    version, result = kept.get(name, (None, None))
    if version != doc_starts_bn._version:
        version, result = kept[name] = doc_starts_bn._version, make()
    return result


def slot_count(n: int, block_size: int) -> int:
    return -(-n // block_size)


def slot_starts(doc_starts_bn: Tensor | None, n: int, block_size: int, device: torch.device) -> Tensor:
    """First position of the complete block in each slot, int64 [B or 1, slots]; -1 where a slot holds none."""
    slots = slot_count(n, block_size)
    if doc_starts_bn is None:
        start = torch.arange(slots, device=device) * block_size
        return torch.where(start + block_size <= n, start, -1)[None]
    position = torch.arange(n, device=device)
    last = (position + block_size - 1).clamp(max=n - 1)
    begins = (position - doc_starts_bn) % block_size == 0
    complete = begins & (doc_starts_bn[:, last] == doc_starts_bn) & (position + block_size <= n)
    start_bn = torch.where(complete, position, -1)
    padded = torch.nn.functional.pad(start_bn, (0, slots * block_size - n), value=-1)
    return padded.view(-1, slots, block_size).amax(-1)


def key_slots(doc_starts_n: Tensor | None, n: int, block_size: int, device: torch.device) -> Tensor:
    """Slot of the block each key belongs to, int64 [N], for one row."""
    position = torch.arange(n, device=device)
    if doc_starts_n is None:
        return position // block_size
    start = doc_starts_n.long()
    return start // block_size + (position - start) // block_size
