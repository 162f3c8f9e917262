"""Routing in PyTorch: pooled keys, block scores and exact top-k, a chunk of queries at a time.

The selection is the oracle's (ties go to the lower block; own block first, the others in ascending order, then -1),
no gradient flows, and no more than one chunk of `[chunk, N / b]` scores exists at once.
It refuses nothing: `checks.py` has seen the arguments.
"""

import torch
from torch import Tensor

from ssa_kernels.layout import slot_count, slot_starts
from ssa_kernels.spec import BlockSpec


def pooled_blocks(x_bnhd: Tensor, doc_starts: Tensor | None, block_size: int) -> Tensor:
    """Mean over each slot's complete block, [B, slots, Hkv, D] in x's dtype; zero where a slot holds none.
    Differentiable."""
    batch, _, heads, dim = x_bnhd.shape
    slots = slot_count(x_bnhd.shape[1], block_size)
    if doc_starts is None:  # blocks are aligned, and only the last can be missing
        whole = x_bnhd.shape[1] // block_size
        mean = x_bnhd[:, : whole * block_size].reshape(batch, whole, block_size, heads, dim).mean(2)
        return torch.nn.functional.pad(mean, (0, 0, 0, 0, 0, slots - whole))
    starts_bs = slot_starts(doc_starts, x_bnhd.shape[1], block_size, x_bnhd.device)
    index = (starts_bs.clamp(min=0)[..., None] + torch.arange(block_size, device=x_bnhd.device)).flatten(1)
    index = index.clamp(max=x_bnhd.shape[1] - 1)[..., None, None].expand(-1, -1, heads, dim)
    mean = x_bnhd.gather(1, index).view(batch, slots, block_size, heads, dim).mean(2)
    return mean * (starts_bs >= 0)[..., None, None]


def best(score: Tensor, count: int) -> Tensor:
    """Columns of the `count` highest non-negative scores, lower column first among equals; -1 where fewer exist."""
    columns = score.shape[-1]
    # Scores are >= 0, so their bit patterns order as integers; the low word makes every key distinct and breaks ties.
    bits = score.float().contiguous().view(torch.int32).long() << 32
    key = torch.where(score >= 0, bits | torch.arange(columns, 0, -1, device=score.device), -1)
    top = key.topk(min(count, columns), -1).values
    column = torch.where(top >= 0, columns - (top & 0xFFFFFFFF), -1)
    return torch.nn.functional.pad(column, (0, count - column.shape[-1]), value=-1)


def select_blocks(
    q: Tensor, k: Tensor, spec: BlockSpec, scale: float, doc_starts: Tensor | None, query_index: Tensor | None
) -> Tensor:
    """int32 [B, Nq, Hkv, block_count]; see `ssa_kernels.api.select_blocks`."""
    with torch.no_grad():
        return _select(q, k, spec, scale, doc_starts, query_index)


def _select(q, k, spec, scale, doc_starts, query_index) -> Tensor:
    (batch, n_q, h_q, dim), (n, h_kv), size, count = q.shape, k.shape[1:3], spec.block_size, spec.block_count
    on_cpu, device = q.device.type == "cpu", q.device
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.full((batch, n_q, h_kv, count), -1, dtype=torch.int32, device=device)
    starts_bs = slot_starts(doc_starts, n, size, device)
    kbar_bhsd = pooled_blocks(k.to(work), doc_starts, size).transpose(1, 2)
    at = torch.arange(n, device=device) if query_index is None else query_index.long()
    chunk = max(16, (1 << (20 if on_cpu else 26)) // max(1, h_q * slot_count(n, size)))
    for b in range(batch):
        begin = torch.zeros_like(at) if doc_starts is None else doc_starts[b].long()[at]
        own = (at - begin) // size
        out[b, :, :, 0] = own[:, None]
        for lo in range(0, n_q, chunk):
            hi = min(lo + chunk, n_q)
            t, s, own_c = at[lo:hi], begin[lo:hi], own[lo:hi]
            if count == 1:
                continue
            if on_cpu and int(own_c.max()) < count:  # everything earlier fits: no scores needed
                earlier = torch.arange(count - 1, device=device).expand(hi - lo, -1)
                out[b, lo:hi, :, 1:] = torch.where(earlier < own_c[:, None], earlier, -1)[:, None]
                continue
            first, last = (int((s // size).min()), int((t // size).max()) + 1) if on_cpu else (0, starts_bs.shape[1])
            start = starts_bs[b if doc_starts is not None else 0, first:last]
            seen = (start >= s[:, None]) & (start + size <= t[:, None] + 1)  # implies the same document
            q_hcd = (q[b, lo:hi].to(work) * scale).view(hi - lo, h_kv, -1, dim).permute(1, 2, 0, 3).flatten(1, 2)
            score = torch.bmm(q_hcd, kbar_bhsd[b, :, first:last].transpose(1, 2)).view(h_kv, -1, hi - lo, last - first)
            score = score.masked_fill_(~seen, float("-inf")).softmax(-1).sum(1)  # [Hkv, chunk, slots]
            candidate = seen & (start < (s + own_c * size)[:, None])
            score = torch.where(candidate, score, -1.0)
            chosen = _choose(score, (s // size - first)[:, None], own_c[:, None], spec)
            out[b, lo:hi, :, 1:] = chosen.transpose(0, 1)
    return out


def _choose(score: Tensor, base: Tensor, own: Tensor, spec: BlockSpec) -> Tensor:
    """Block numbers [Hkv, chunk, block_count - 1] in ascending order, -1 last; `base` is the column of block 0."""
    slot = best(score, spec.block_count - 1)
    if spec.reference:
        edge = own // 16 * 16  # blocks before the current chunk of 16
        early = (torch.arange(score.shape[-1], device=score.device) - base) < edge
        parts = torch.cat([best(score.where(early, -1.0), 8), best(score.where(~early, -1.0), 7)], -1)
        slot = torch.where(edge > 0, parts, slot)
    huge = 1 << 30
    block = torch.where(slot >= 0, slot - base, huge).sort(-1).values
    return torch.where(block < huge, block, -1)
