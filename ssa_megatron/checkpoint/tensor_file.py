"""Tensors into safetensors files: streamed chunk by chunk, hashed on the way, before the disk can lie about them.

Whatever the tensors' size, a thread holds one chunk of host memory at most (none for tensors that live there already). Hashing
and writing release the interpreter lock, so several files are written at the pace of several cores while training goes on.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ssa_megatron.checkpoint.manifest import StoredFile

CHUNK_BYTES = 16 * 2**20
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


class HostCopies:
    """Bytes of tensors in host memory, one chunk at a time. One object serves one thread.

    ready: on CUDA, the event after which the tensors hold what is to be copied. Copies run on a stream of their own, so that
    they neither wait for the kernels that training has queued meanwhile nor delay them; each chunk has arrived when it is given.
    """

    def __init__(self, ready: torch.cuda.Event | None = None):
        self._ready = ready
        self._stream: torch.cuda.Stream | None = None
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def chunks(self, tensor: Tensor) -> Iterator[memoryview]:
        """The bytes of a 1-d contiguous tensor; a chunk is valid until the next one is asked for."""
        for part in tensor.detach().view(torch.uint8).split(CHUNK_BYTES):
            yield (self._copy(part) if part.is_cuda else part).numpy().data

    def _copy(self, part: Tensor) -> Tensor:
        if self._stream is None:
            self._stream = torch.cuda.Stream(part.device)
            self._buffer = torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
            if self._ready is not None:
                self._stream.wait_event(self._ready)
        with torch.cuda.stream(self._stream):
            self._buffer[: part.numel()].copy_(part, non_blocking=True)
        self._stream.synchronize()
        return self._buffer[: part.numel()]


def write_safetensors(path: Path, tensors: dict[str, Tensor], copies: HostCopies | None = None) -> StoredFile:
    """A safetensors file of 1-d tensors, on disk (fsync) when this returns. Raises OSError when it cannot be written.

    The safetensors library writes whole dictionaries at once and hashes nothing.
    """
    header, at = {}, 0
    for key, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    copies = copies or HostCopies()
    sha, total = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:

        def put(chunk) -> None:
            nonlocal total
            sha.update(chunk)
            while len(chunk):  # a raw write may take a part only, e.g. up to a limit; the rest then says why
                taken = file.write(chunk)
                chunk, total = chunk[taken:], total + taken

        put(struct.pack("<Q", len(head)) + head)
        for tensor in tensors.values():
            for chunk in copies.chunks(tensor):
                put(chunk)
        os.fsync(file.fileno())
    return StoredFile(bytes=total, sha256=sha.hexdigest())
