"""Key/value caches of one attention layer: contiguous (`KVCache`) and paged (`PagedKVCache`), pooled keys included.

A cache holds the keys and values of `batch` sequences, each of its own length, and the mean key of every complete
block, to fp32's accuracy; the keys of a block still being filled are pooled when its last token arrives. Lengths live
twice: `lengths` on the device, which kernels read, and `host_lengths`, Python integers by which a full cache is
refused without asking the GPU. Nothing beyond a sequence's length is ever read.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ssa_kernels.api import choose_backend
from ssa_kernels.autograd import plain
from ssa_kernels.checks import FLOATS, need, whole

STEP = 16
"""Most new tokens of a sequence that one launch appends and that the decode kernels serve; more is a prefill."""


def split_halves(mean: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] as [..., halves, D]: what rounding to half precision loses is a second half-precision number."""
    high = mean.to(dtype)
    if dtype.itemsize > 2:
        return high[..., None, :]
    return torch.stack((high, (mean - high).to(dtype)), -2)


def join_halves(pooled: Tensor) -> Tensor:
    """Inverse of `split_halves`, in fp32 or wider."""
    return pooled.to(torch.promote_types(pooled.dtype, torch.float32)).sum(-2)


def _integer(name: str, value, least: int) -> None:
    need(whole(value, least), name, value, f"an integer of at least {least}")


class _Cache(ABC):
    """What both caches share; a subclass says which row of storage holds a place of a sequence."""

    page_size = 0
    page_table: Tensor | None = None

    def __init__(self, batch, rows, capacity, kv_heads, head_dim, block_size, dtype, device):
        for name, value in (("batch", batch), ("kv_heads", kv_heads), ("head_dim", head_dim)):
            _integer(name, value, 1)
        need(dtype in FLOATS, "dtype", dtype, "a floating type")
        self.batch, self.capacity, self.kv_heads, self.head_dim = batch, capacity, kv_heads, head_dim
        self.block_size, self.slots = block_size, -(-capacity // block_size)
        pooled_rows = rows // block_size if self.page_size else batch * self.slots
        halves = 2 if dtype.itemsize == 2 else 1
        self.keys = torch.empty(rows, kv_heads, head_dim, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.pooled = torch.empty(pooled_rows, kv_heads, halves, head_dim, dtype=dtype, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.host_lengths = [0] * batch

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.device

    def room(self, sequence: int) -> int:
        """Tokens the sequence may hold."""
        return self.capacity

    def reserve(self, tokens: int | list[int] = 1) -> None:
        """Count new tokens of every active sequence on the host; refuses, and counts none, where one has no room.

        `append` calls it. Whoever replays a CUDA graph that holds an `append` calls it before each replay, because a
        replay runs no Python.
        """
        counts = tokens if isinstance(tokens, list) else [tokens] * self.batch
        right = len(counts) == self.batch and all(whole(c, 0) for c in counts)
        need(right, "tokens", tokens, f"an integer of at least 0, or a list of {self.batch} of them")
        grown = [n if n < 0 else n + c for n, c in zip(self.host_lengths, counts, strict=True)]
        for b, n in enumerate(grown):
            if n > self.room(b):
                got = f"{counts[b]} more tokens for sequence {b} of {self.host_lengths[b]}"
                need(False, "k.shape[1]", got, f"room in the cache: it holds at most {self.room(b)}")
        self.host_lengths = grown

    @torch.no_grad()
    def append(self, k: Tensor, v: Tensor, counts: list[int] | None = None, backend: str = "auto") -> None:
        """Add T new tokens to every sequence: its keys and values, and the pooled keys of the blocks they complete.

        k, v: [B, T, Hkv, D] in the cache's dtype.
        counts: real tokens of each sequence, its last `counts[b]` of T (a batch padded on the left); default all T.
            Padding never enters the cache, so a place is the sequence's own position.
        backend: as in `ssa_kernels.api`. Up to STEP tokens without counts are one Triton launch on CUDA, which a CUDA
            graph may capture.
        Keys and values that require a gradient are kept without it.
        Raises: KernelArgumentError; nothing is written then.
        """
        self._check_new(k, v, counts)
        backend = choose_backend(backend, k)
        tokens, capturing = k.shape[1], k.is_cuda and torch.cuda.is_current_stream_capturing()
        if counts is None and tokens <= STEP and backend == "triton":
            from ssa_kernels.triton import cache_append as triton_append

            if not capturing:  # a captured launch does not run; each replay is counted by its caller
                self.reserve(tokens)
            with plain(k):
                triton_append.append(self, k.contiguous(), v.contiguous())
            return
        need(not capturing, "k.shape[1]", f"{tokens} tokens, counts={counts}, while a CUDA graph is captured",
             f"at most {STEP} tokens and no counts")  # fmt: skip
        before = self.host_lengths
        self.reserve(tokens if counts is None else counts)
        for b, (old, new) in enumerate(zip(before, self.host_lengths, strict=True)):
            if new > old:
                self._write(b, old, k[b, tokens - new + old :], v[b, tokens - new + old :])
        self._publish_lengths()

    def _check_new(self, k, v, counts):
        for name, x in (("k", k), ("v", v)):
            need(isinstance(x, Tensor), name, type(x).__name__, "a tensor [B, T, Hkv, D]")
            shape = (self.batch, x.shape[1] if x.dim() == 4 else 0, self.kv_heads, self.head_dim)
            need(tuple(x.shape) == shape and shape[1] >= 1, f"{name}.shape", tuple(x.shape),
                 f"[B, T, Hkv, D] = [{self.batch}, >= 1, {self.kv_heads}, {self.head_dim}]")  # fmt: skip
            need(x.dtype == self.dtype, f"{name}.dtype", x.dtype, f"the cache's {self.dtype}")
            need(x.device == self.device, f"{name}.device", x.device, f"the cache's {self.device}")
        need(k.shape == v.shape, "v.shape", tuple(v.shape), f"k's shape {tuple(k.shape)}")
        if counts is not None:
            right = isinstance(counts, list) and len(counts) == self.batch
            right = right and all(whole(c, 0) and c <= k.shape[1] for c in counts)
            need(right, "counts", counts, f"a list of {self.batch} integers from 0 to {k.shape[1]}")

    def _write(self, b: int, start: int, k: Tensor, v: Tensor) -> None:
        """k, v [T, Hkv, D] at places start, start + 1, ... of one sequence."""
        end, size = start + k.shape[0], self.block_size
        rows = self.token_rows(b, start, end)
        self.keys[rows], self.values[rows] = k, v
        first, last = start // size, end // size
        if last > first:
            whole = self.keys[self.token_rows(b, first * size, last * size)].unflatten(0, (-1, size))
            mean = whole.to(torch.promote_types(self.dtype, torch.float32)).mean(1)
            self.pooled[self.block_rows(b, first, last)] = split_halves(mean, self.dtype)

    def _upload(self, target: Tensor, values: list[int]) -> None:
        """From pinned memory, which does not make the host wait for the GPU."""
        target.copy_(torch.tensor(values, dtype=torch.int32, pin_memory=target.is_cuda), non_blocking=True)

    def _publish_lengths(self) -> None:
        self._upload(self.lengths, self.host_lengths)

    def crop(self, lengths: list[int]) -> None:
        """Forget what lies beyond `lengths` (one per sequence, none longer than it is)."""
        right = isinstance(lengths, list) and len(lengths) == self.batch
        right = right and all(
            whole(n, min(0, old)) and n <= old for n, old in zip(lengths, self.host_lengths, strict=True)
        )
        need(right, "lengths", lengths, f"a list of integers of at most {self.host_lengths}")
        self.host_lengths = list(lengths)
        self._publish_lengths()

    def sequence(self, b: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence, [1, length, Hkv, D]: views of a contiguous cache, copies of pages."""
        rows = self.token_rows(b, 0, max(0, self.host_lengths[b]))
        return self.keys[rows][None], self.values[rows][None]

    @abstractmethod
    def token_rows(self, b: int, first: int, last: int) -> slice | Tensor:
        """Rows of `keys` and `values` that hold tokens first .. last - 1 of one sequence."""

    @abstractmethod
    def block_rows(self, b: int, first: int, last: int) -> slice | Tensor:
        """Rows of `pooled` that hold blocks first .. last - 1 of one sequence."""


class KVCache(_Cache):
    """Contiguous: every sequence owns `capacity` tokens.

    keys, values: [B * capacity, Hkv, D]; pooled: [B * ceil(capacity / block_size), Hkv, halves, D];
    lengths: int32 [B]. block_size is fixed with the cache (the pooled keys are its), block_count is each call's own.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        _integer("batch", batch, 1)
        _integer("capacity", capacity, 1)
        _integer("block_size", block_size, 1)
        super().__init__(batch, batch * capacity, capacity, kv_heads, head_dim, block_size, dtype, device)

    def token_rows(self, b: int, first: int, last: int) -> slice:
        return slice(b * self.capacity + first, b * self.capacity + last)

    def block_rows(self, b: int, first: int, last: int) -> slice:
        return slice(b * self.slots + first, b * self.slots + last)

    def every_token(self, x: Tensor, count: int) -> Tensor:
        """keys or values as [B, count, Hkv, D], a view."""
        return x.unflatten(0, (self.batch, -1))[:, :count]

    every_block = every_token

    def reorder(self, sequences: Tensor) -> None:
        """Sequence i becomes a copy of what sequence `sequences[i]` is (beam search). int64 [B].

        Waits for the GPU only when lengths differ. Values are checked on a CPU only. Raises KernelArgumentError.
        """
        need(isinstance(sequences, Tensor), "sequences", type(sequences).__name__, "an int64 tensor [B]")
        need(sequences.dtype == torch.int64, "sequences.dtype", sequences.dtype, "int64")
        shape = tuple(sequences.shape)
        need(shape == (self.batch,), "sequences.shape", shape, f"[B] = [{self.batch}]")
        need(sequences.device == self.device, "sequences.device", sequences.device, f"the cache's {self.device}")
        if not sequences.is_cuda:
            low, high = int(sequences.min()), int(sequences.max())
            right = low >= 0 and high < self.batch
            need(right, "sequences", f"values {low}..{high}", f"0..{self.batch - 1}, sequences of the cache")
        for name in ("keys", "values", "pooled"):
            x = getattr(self, name).unflatten(0, (self.batch, -1))
            setattr(self, name, x.index_select(0, sequences).flatten(0, 1))
        self.lengths = self.lengths.index_select(0, sequences)
        if len(set(self.host_lengths)) > 1:
            self.host_lengths = [self.host_lengths[i] for i in sequences.tolist()]

    def grow(self, capacity: int) -> None:
        """Move to larger storage (a CUDA graph captured before holds the old one)."""
        _integer("capacity", capacity, self.capacity)
        slots = -(-capacity // self.block_size)
        for name, rows in (("keys", capacity), ("values", capacity), ("pooled", slots)):
            old = getattr(self, name).unflatten(0, (self.batch, -1))
            new = old.new_empty(self.batch, rows, *old.shape[2:])
            new[:, : old.shape[1]] = old
            setattr(self, name, new.flatten(0, 1))
        self.capacity, self.slots = capacity, slots


class PagedKVCache(_Cache):
    """Paged: sequences hold pages of a common pool, in any order; a server assigns them.

    keys, values: [pages * page_size, Hkv, D]; pooled: [pages * page_size / block_size, Hkv, halves, D]: the pooled
    keys of a page belong to the page, so that sequences which share a prefix's whole pages share those too.
    page_table: int32 [B, max_pages], -1 where none is assigned. A sequence is idle (length -1: `append` skips it, its
    attention is zero) until `assign` gives it pages.
    page_size must be a multiple of 16 and of block_size.
    """

    def __init__(
        self,
        batch: int,
        pages: int,
        page_size: int,
        max_pages: int,
        kv_heads: int,
        head_dim: int,
        *,
        block_size: int = 16,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ):
        for name, value in (("pages", pages), ("page_size", page_size), ("max_pages", max_pages)):
            _integer(name, value, 1)
        _integer("batch", batch, 1)
        _integer("block_size", block_size, 1)
        need(page_size % 16 == 0 and page_size % block_size == 0, "page_size", page_size,
             f"a multiple of 16 and of block_size={block_size}")  # fmt: skip
        self.page_size, self.pages = page_size, pages
        super().__init__(batch, pages * page_size, max_pages * page_size, kv_heads, head_dim, block_size, dtype, device)
        self.page_table = torch.full((batch, max_pages), -1, dtype=torch.int32, device=device)
        self.assigned: list[list[int]] = [[] for _ in range(batch)]
        self.host_lengths = [-1] * batch
        self._publish_lengths()

    def room(self, sequence: int) -> int:
        return len(self.assigned[sequence]) * self.page_size

    def assign(self, sequence: int, pages: list[int], length: int | None = None) -> None:
        """Give a sequence these pages, in the order of its tokens, in place of those it had.

        length: tokens the pages already hold (a shared prefix, or the sequence's own); default: what it holds, 0 for
            an idle one. Whole pages before it may be shared with other sequences; which page is free, and that no two
            sequences write to one, is the server's to know. No pages and length -1 make the sequence idle.
        Raises: KernelArgumentError.
        """
        right = whole(sequence, 0) and sequence < self.batch
        need(right, "sequence", sequence, f"an integer from 0 to {self.batch - 1}")
        right = isinstance(pages, list) and all(whole(p, 0) and p < self.pages for p in pages)
        need(right and len(set(pages)) == len(pages), "pages", pages, f"distinct integers from 0 to {self.pages - 1}")
        limit = self.page_table.shape[1]
        need(len(pages) <= limit, "pages", f"{len(pages)} pages", f"at most max_pages={limit}")
        length = max(0, self.host_lengths[sequence]) if length is None else length
        most = len(pages) * self.page_size
        right = whole(length, 0 if pages else -1) and length <= most
        need(right, "length", length, f"0 to {most}, what {len(pages)} pages hold (-1 without pages: idle)")
        self.assigned[sequence] = list(pages)
        self._upload(self.page_table[sequence], pages + [-1] * (limit - len(pages)))
        self.host_lengths[sequence] = length
        self._publish_lengths()

    def _rows(self, table: Tensor, first: int, last: int, size: int) -> Tensor:
        place = torch.arange(first, last, device=self.device)
        return table[..., place // size].long() * size + place % size

    def token_rows(self, b: int, first: int, last: int) -> Tensor:
        return self._rows(self.page_table[b], first, last, self.page_size)

    def block_rows(self, b: int, first: int, last: int) -> Tensor:
        return self._rows(self.page_table[b], first, last, self.page_size // self.block_size)

    def every_token(self, x: Tensor, count: int) -> Tensor:
        """keys or values as [B, count, Hkv, D], gathered; places that no page holds have no meaning."""
        return x[self._rows(self.page_table.clamp(min=0), 0, count, self.page_size)]

    def every_block(self, x: Tensor, count: int) -> Tensor:
        """pooled as [B, count, Hkv, halves, D], gathered."""
        return x[self._rows(self.page_table.clamp(min=0), 0, count, self.page_size // self.block_size)]
