"""The method in plain, slow, obvious PyTorch, in any float dtype: what every other file of this package is judged by.

It follows arXiv 2511.20102 line by line, one token at a time where that is clearest, and shares no code with the
backends. It may hold `[N, N]` scores and refuses nothing: use it on small inputs, in fp64 for truth and for
`gradcheck`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa_kernels.spec import AttentionStatistics, BlockSpec


def positions(q: Tensor, query_index: Tensor | None) -> list[int]:
    return list(range(q.shape[1])) if query_index is None else query_index.tolist()


def document_starts(k: Tensor, doc_starts: Tensor | None) -> list[list[int]]:
    return [[0] * k.shape[1]] * k.shape[0] if doc_starts is None else doc_starts.tolist()


def pooled(x: Tensor, b: int, start: int, end: int, size: int) -> Tensor:
    """Means over the complete blocks of the document that begins at `start`, as seen when only x[:, :end] exists."""
    count = (end - start) // size
    return x[b, start : start + count * size].reshape(count, size, *x.shape[2:]).mean(1)  # [blocks, Hkv, D]


def select_blocks(
    q: Tensor,
    k: Tensor,
    spec: BlockSpec,
    scale: float,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
) -> Tensor:
    """int32 [B, Nq, Hkv, block_count]: own block first, then the chosen ones in ascending order, then -1."""
    size, count, h_kv = spec.block_size, spec.block_count, k.shape[2]
    starts = document_starts(k, doc_starts)
    out = torch.full((q.shape[0], q.shape[1], h_kv, count), -1, dtype=torch.int32)
    for b in range(q.shape[0]):
        for row, t in enumerate(positions(q, query_index)):
            start = starts[b][t]
            own = (t - start) // size
            out[b, row, :, 0] = own
            if own == 0 or count == 1:
                continue
            score = block_scores(q[b, row], pooled(k, b, start, t + 1, size), scale)[:, :own]  # [Hkv, candidates]
            for h in range(h_kv):
                order = torch.sort(score[h], descending=True, stable=True).indices.tolist()
                chunk = own // 16 * 16
                if spec.reference and chunk > 0:
                    chosen = [j for j in order if j < chunk][:8] + [j for j in order if j >= chunk][:7]
                else:
                    chosen = order[: count - 1]
                out[b, row, h, 1 : 1 + len(chosen)] = torch.tensor(sorted(chosen), dtype=torch.int32)
    return out.to(q.device)


def block_scores(q_hd: Tensor, kbar_jhd: Tensor, scale: float) -> Tensor:
    """Sum over the G heads of a group of each head's softmax over the pooled keys: [Hkv, blocks]."""
    h_kv = kbar_jhd.shape[1]
    q_hgd = q_hd.reshape(h_kv, -1, q_hd.shape[-1])
    return (torch.einsum("hgd,jhd->hgj", q_hgd, kbar_jhd) * scale).softmax(-1).sum(1)


def full_mask(q: Tensor, k: Tensor, doc_starts: Tensor | None = None, query_index: Tensor | None = None) -> Tensor:
    """bool [B, 1, Nq, N]: key not after the query, and of the query's document."""
    starts = torch.tensor(document_starts(k, doc_starts))
    at = torch.tensor(positions(q, query_index))
    key = torch.arange(k.shape[1])
    return ((key <= at[:, None])[None] & (key >= starts[:, at, None]))[:, None].to(q.device)


def sparse_mask(
    q: Tensor,
    k: Tensor,
    blocks: Tensor,
    spec: BlockSpec,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
) -> Tensor:
    """bool [B, Hq, Nq, N]: inside the full mask, and in a selected block."""
    starts = torch.tensor(document_starts(k, doc_starts), device=q.device)
    at = torch.tensor(positions(q, query_index), device=q.device)
    key = torch.arange(k.shape[1], device=q.device)
    block_of_key = (key - starts[:, at, None]).div(
        spec.block_size, rounding_mode="floor"
    )  # [B, Nq, N], query's document
    chosen = (blocks[..., None] == block_of_key[:, :, None, None, :]).any(3)  # [B, Nq, Hkv, N]
    chosen = chosen.transpose(1, 2).repeat_interleave(q.shape[2] // k.shape[2], 1)
    return chosen & full_mask(q, k, doc_starts, query_index)


def window_mask(
    q: Tensor, k: Tensor, window: int, doc_starts: Tensor | None = None, query_index: Tensor | None = None
) -> Tensor:
    """bool [B, 1, Nq, N]: inside the full mask, and among the last `window` tokens, own included."""
    at = torch.tensor(positions(q, query_index), device=q.device)
    key = torch.arange(k.shape[1], device=q.device)
    return full_mask(q, k, doc_starts, query_index) & (key > at[:, None] - window)


def attention_weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention [B, Hq, Nq, N]; a row with nothing to see is zero."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    score = torch.einsum("bnhd,bmhd->bhnm", q, k) * scale
    seen = mask.any(-1, keepdim=True)
    weight = score.masked_fill(~mask & seen, float("-inf")).softmax(-1)
    return torch.where(seen, weight, 0.0)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    return torch.einsum("bhnm,bmhd->bnhd", attention_weights(q, k, mask, scale), v)


def full_attention(q, k, v, scale: float, doc_starts=None, query_index=None) -> Tensor:
    return attention(q, k, v, full_mask(q, k, doc_starts, query_index), scale)


def sparse_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts=None, query_index=None, blocks=None) -> Tensor:
    if blocks is None:
        blocks = select_blocks(q.detach(), k.detach(), spec, scale, doc_starts, query_index)
    return attention(q, k, v, sparse_mask(q, k, blocks, spec, doc_starts, query_index), scale)


def window_attention(q, k, v, window: int, scale: float, doc_starts=None, query_index=None) -> Tensor:
    return attention(q, k, v, window_mask(q, k, window, doc_starts, query_index), scale)


def compressed_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts=None, query_index=None) -> Tensor:
    """nsa's first stream: attention over the pooled (k, v) of the blocks complete at the token; zero where there is
    none."""
    starts = document_starts(k, doc_starts)
    batch = []
    for b in range(q.shape[0]):
        rows = []
        for row, t in enumerate(positions(q, query_index)):
            kbar = pooled(k, b, starts[b][t], t + 1, spec.block_size)[None]  # [1, blocks, Hkv, D]
            vbar = pooled(v, b, starts[b][t], t + 1, spec.block_size)[None]
            q_row = q[b : b + 1, row : row + 1]
            if kbar.shape[1] == 0:
                rows.append(q_row[0] * 0)
            else:
                mask = torch.ones(1, 1, 1, kbar.shape[1], dtype=torch.bool, device=q.device)
                rows.append(attention(q_row, kbar, vbar, mask, scale)[0])
        batch.append(torch.cat(rows))
    return torch.stack(batch)


def ssa_attention(
    q, k, v, gate, spec: BlockSpec, *, trunk: str, scale: float, doc_starts=None, query_index=None, blocks=None
) -> tuple[Tensor, Tensor]:
    """Gated trunk and alignment loss, the two SmoothL1 terms written out with their stop-gradients."""
    full = gate[..., None] * full_attention(q, k, v, scale, doc_starts, query_index)
    sparse = gate[..., None] * sparse_attention(q, k, v, spec, scale, doc_starts, query_index, blocks)
    loss = F.smooth_l1_loss(full, sparse.detach()) + F.smooth_l1_loss(full.detach(), sparse)
    return (full if trunk == "full" else sparse), loss


def attention_statistics(q, k, spec: BlockSpec, scale: float, doc_starts=None, query_index=None) -> AttentionStatistics:
    weight = attention_weights(q, k, full_mask(q, k, doc_starts, query_index), scale)
    blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    inside = (weight * sparse_mask(q, k, blocks, spec, doc_starts, query_index)).sum(-1).mean((0, 2))
    entropy = -torch.special.xlogy(weight, weight).sum(-1).mean((0, 2))
    return AttentionStatistics(inside, entropy)
