"""The streams in memory-lean PyTorch: a chunk of queries at a time, scores recomputed in backward, statistics in fp32.

Activations kept for backward are O(N * D); full and sparse streams share one score matrix, and no key that causality or the
document puts out of a chunk's reach is read where that is known without synchronising a GPU.
It refuses nothing: `checks.py` has seen the arguments.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import key_slots, slot_count, slot_starts
from .spec import AttentionStatistics, BlockSpec
from .torch_routing import pooled_blocks, select_blocks

NEG_INF = float("-inf")
UNSAFE = 1e-20  # a sparse row sum this far below the full maximum is recomputed with its own maximum (fp32 underflow)


class Stream(NamedTuple):
    """What a query may see, apart from causality and documents."""

    kind: str  # "full" | "sparse" | "window" | "pooled" | "both" (full and sparse)
    block_size: int = 0
    window: int = 0


class Tile(NamedTuple):
    """One piece of work: batch row b, KV heads, query rows, key columns, and the masks between them."""

    b: int
    heads: slice
    rows: slice
    cols: slice
    hidden: Tensor | None  # bool [rows, cols - from_col], True = not visible
    from_col: int  # columns (within the tile) before this are visible to every row
    chosen: Tensor | None  # [heads, 1, rows, cols] in the work dtype: 1 inside the selected blocks, 0 outside


class Geometry:
    """Positions, documents and masks of one call."""

    def __init__(self, q, k, stream: Stream, doc_starts, query_index, blocks):
        self.stream, self.doc_starts, self.blocks = stream, doc_starts, blocks
        self.device, self.on_cpu = q.device, q.device.type == "cpu"
        self.batch, self.n_q, self.h_q, self.dim = q.shape
        self.n_k, self.h_kv = k.shape[1:3]
        self.aligned = query_index is None
        self.at = torch.arange(self.n_k if self.aligned else 0, device=q.device) if self.aligned else query_index.long()
        self.work = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.key_start = None  # pooled keys only: [B or 1, slots] first position of each pooled block, -1 = none

    def tiles(self) -> Iterator[Tile]:
        group = self.h_q // self.h_kv
        # On a CPU a tile's scores should stay in cache; on a GPU a tile must fill it.
        budget = (1 << 19) if self.on_cpu else (1 << 27)
        rows = 128 if self.on_cpu else max(16, min(1024, budget // (self.h_q * self.n_k)))
        heads = max(1, min(self.h_kv, budget // (rows * group * self.n_k)))
        for b in range(self.batch):
            slot_of_key = None
            if self.blocks is not None:
                starts = None if self.doc_starts is None else self.doc_starts[b]
                slot_of_key = key_slots(starts, self.n_k, self.stream.block_size, self.device)
            for lo in range(0, self.n_q, rows):
                piece = slice(lo, min(lo + rows, self.n_q))
                cols, hidden, from_col = self.visibility(b, piece)
                for head in range(0, self.h_kv, heads):
                    h = slice(head, min(head + heads, self.h_kv))
                    chosen = None if self.blocks is None else self.chosen(b, h, piece, cols, slot_of_key)
                    yield Tile(b, h, piece, cols, hidden, from_col, chosen)

    def visibility(self, b: int, rows: slice) -> tuple[slice, Tensor | None, int]:
        t = self.at[rows]
        begin = None if self.doc_starts is None else self.doc_starts[b].long()[t]
        if self.stream.kind == "pooled":
            start = self.key_start[b if self.key_start.shape[0] > 1 else 0]
            seen = (start >= (0 if begin is None else begin[:, None])) & (
                start + self.stream.block_size <= t[:, None] + 1
            )
            return slice(0, self.n_k), ~seen, 0
        first, last = 0, self.n_k
        if self.on_cpu:
            first, last = (0 if begin is None else int(begin.min())), int(t.max()) + 1
            if self.stream.kind == "window":
                first = max(first, int(t.min()) - self.stream.window + 1)
        elif self.aligned:
            last = rows.stop
            if self.stream.kind == "window":
                first = max(0, rows.start - self.stream.window + 1)
        # Rows in order and no documents: only the chunk's own square needs the causal mask.
        simple = self.aligned and begin is None and self.stream.kind != "window"
        from_col = rows.start if simple else 0
        key = torch.arange(first + from_col, last, device=self.device)
        hidden = key > t[:, None]
        if begin is not None:
            hidden |= key < begin[:, None]
        if self.stream.kind == "window":
            hidden |= key <= t[:, None] - self.stream.window
        return slice(first, last), hidden, from_col

    def chosen(self, b: int, h: slice, rows: slice, cols: slice, slot_of_key: Tensor) -> Tensor:
        """[heads, 1, rows, cols]: 1 where the key's block is selected (causality and documents are `hidden`'s affair)."""
        size, slots = self.stream.block_size, slot_count(self.n_k, self.stream.block_size)
        block = self.blocks[b, rows, h].transpose(0, 1).long()  # [heads, rows, count]
        if self.doc_starts is not None:
            base = self.doc_starts[b].long()[self.at[rows]] // size
            slot = torch.where(block >= 0, block + base[:, None], slots)
        else:
            slot = torch.where(block >= 0, block, slots)
        mask = torch.zeros(*block.shape[:2], slots + 1, dtype=self.work, device=self.device)
        mask.scatter_(2, slot.clamp_(max=slots), 1.0)
        if self.doc_starts is None:
            first, last = cols.start // size, -(-cols.stop // size)
            wide = mask[..., first:last, None].expand(-1, -1, -1, size).flatten(2)
            return wide[..., cols.start - first * size : cols.stop - first * size][:, None]
        return mask.index_select(2, slot_of_key[cols])[:, None]


def _per_head(x_bnhd: Tensor, work: torch.dtype) -> Tensor:
    """[B, Hkv, N, D], contiguous; half precision stays as it is on a GPU, where products accumulate in fp32."""
    x = x_bnhd.transpose(1, 2)
    return x.contiguous() if x.is_cuda else x.to(work).contiguous()


def _rows(x_bnhd: Tensor, tile: Tile, g: Geometry, work: torch.dtype | None) -> Tensor:
    """The tile's query-side rows as [heads, G * rows, D]."""
    group = g.h_q // g.h_kv
    x = x_bnhd[tile.b, tile.rows, tile.heads.start * group : tile.heads.stop * group]
    x = x.unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2)
    return x if work is None else x.to(work)


def _store(out_bnhd: Tensor, tile: Tile, g: Geometry, x: Tensor) -> None:
    """Inverse of `_rows`."""
    group = g.h_q // g.h_kv
    n = tile.rows.stop - tile.rows.start
    place = out_bnhd[tile.b, tile.rows, tile.heads.start * group : tile.heads.stop * group]
    place.copy_(x.unflatten(1, (group, n)).permute(2, 0, 1, 3).flatten(1, 2))


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """Batched product, accumulated and returned in fp32 (fp64 for fp64)."""
    if b.dtype in (torch.float32, torch.float64):
        return torch.bmm(a.to(b.dtype), b)
    return torch.bmm(a.to(b.dtype), b, out_dtype=torch.float32)


def _scores(q_rows: Tensor, k_cols: Tensor, tile: Tile, scale: float) -> Tensor:
    """Scaled scores [heads, G * rows, cols], -inf where not visible."""
    score = _mm(q_rows, k_cols.transpose(1, 2)).mul_(scale)
    n = tile.rows.stop - tile.rows.start
    score.unflatten(1, (-1, n))[..., tile.from_col :].masked_fill_(tile.hidden, NEG_INF)
    return score


def _times_mask(weight: Tensor, chosen: Tensor) -> Tensor:
    """weight [heads, G * rows, cols] where chosen, else 0."""
    return (weight.unflatten(1, (-1, chosen.shape[2])) * chosen).flatten(1, 2)


def _only_chosen(score: Tensor, chosen: Tensor) -> Tensor:
    return score.unflatten(1, (-1, chosen.shape[2])).masked_fill(chosen == 0, NEG_INF).flatten(1, 2)


def _softmax_parts(score: Tensor) -> tuple[Tensor, Tensor]:
    """exp(score - max) in place and the log-sum-exp [.., 1]; an empty row gives zeros and +inf."""
    top = score.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)
    weight = score.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    return weight, total, torch.where(total > 0, top + total.log(), -NEG_INF)


def _normalised(weight: Tensor, total: Tensor, v_cols: Tensor) -> Tensor:
    return _mm(weight, v_cols) / total.clamp(min=torch.finfo(total.dtype).tiny)


def _both_weights(score: Tensor, chosen: Tensor, g: Geometry):
    """Weights, sums and log-sum-exps of the full and the sparse stream from one score matrix (which is consumed)."""
    if g.on_cpu:
        top = score.amax(-1, keepdim=True)
        full = score.sub_(top).exp_()
        total = full.sum(-1, keepdim=True)
        sparse = _times_mask(full, chosen)
        part = sparse.sum(-1, keepdim=True)
        if bool((part > UNSAFE).all()):
            return full, total, top + total.log(), sparse, part, top + part.log()
        score = full.log_().add_(top)  # rare; only rows whose weights all underflowed lose digits here, so redo exactly
        return None
    sparse, part, lse_sparse = _softmax_parts(_only_chosen(score, chosen))
    full, total, lse = _softmax_parts(score)
    return full, total, lse, sparse, part, lse_sparse


class _OneStream(torch.autograd.Function):
    """Softmax attention over one mask; saves q, k, v, the output and its log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, g: Geometry, scale: float):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty(*q.shape[:3], 1, dtype=g.work, device=q.device)
        k_h, v_h = _per_head(k, g.work), _per_head(v, g.work)
        for tile in g.tiles():
            score = _scores(_rows(q, tile, g, k_h.dtype), k_h[tile.b, tile.heads, tile.cols], tile, scale)
            if tile.chosen is not None:
                score = _only_chosen(score, tile.chosen)
            weight, total, lse_rows = _softmax_parts(score)
            _store(out, tile, g, _normalised(weight, total, v_h[tile.b, tile.heads, tile.cols]))
            _store(lse, tile, g, lse_rows)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.g, ctx.scale = g, scale
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse = ctx.saved_tensors
        g, scale = ctx.g, ctx.scale
        k_h, v_h = _per_head(k, g.work), _per_head(v, g.work)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(k_h.shape, dtype=g.work, device=q.device) for _ in range(2))
        for tile in g.tiles():
            at = (tile.b, tile.heads, tile.cols)
            q_rows, do_rows = _rows(q, tile, g, k_h.dtype), _rows(d_out, tile, g, g.work)
            delta = (do_rows * _rows(out, tile, g, g.work)).sum(-1, keepdim=True)
            score = _scores(q_rows, k_h[at], tile, scale)
            if tile.chosen is not None:
                score = _only_chosen(score, tile.chosen)
            weight = score.sub_(_rows(lse, tile, g, g.work)).exp_()
            dv[at] += _mm(weight.to(v_h.dtype).transpose(1, 2), do_rows.to(v_h.dtype))
            d_score = _mm(do_rows, v_h[at].transpose(1, 2)).sub_(delta).mul_(weight).mul_(scale)
            _store(dq, tile, g, _mm(d_score, k_h[at]))
            dk[at] += _mm(d_score.to(k_h.dtype).transpose(1, 2), q_rows)
        return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), None, None


class _TwoStreams(torch.autograd.Function):
    """Both streams, the gate and the alignment loss (method identities: dF = clip(F - S, -1, 1) / n, dS = -dF)."""

    @staticmethod
    def forward(ctx, q, k, v, gate, g: Geometry, scale: float, trunk: str):
        full, sparse = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
        lse_full, lse_sparse = (torch.empty(*q.shape[:3], 1, dtype=g.work, device=q.device) for _ in range(2))
        k_h, v_h = _per_head(k, g.work), _per_head(v, g.work)
        for tile in g.tiles():
            at = (tile.b, tile.heads, tile.cols)
            q_rows = _rows(q, tile, g, k_h.dtype)
            parts = _both_weights(_scores(q_rows, k_h[at], tile, scale), tile.chosen, g)
            if parts is None:
                score = _scores(q_rows, k_h[at], tile, scale)
                parts_sparse = _softmax_parts(_only_chosen(score, tile.chosen))
                parts = (*_softmax_parts(score), *parts_sparse)
            weight, total, lse, weight_s, total_s, lse_s = parts
            _store(full, tile, g, _normalised(weight, total, v_h[at]))
            _store(sparse, tile, g, _normalised(weight_s, total_s, v_h[at]))
            _store(lse_full, tile, g, lse)
            _store(lse_sparse, tile, g, lse_s)
        gate_w = gate[..., None].to(g.work)
        difference = (full.to(g.work) - sparse.to(g.work)).mul_(gate_w)
        size = difference.abs()
        loss = 2 * torch.where(size < 1, 0.5 * size * size, size - 0.5).mean()
        out = ((full if trunk == "full" else sparse) * gate_w).to(q.dtype)
        ctx.save_for_backward(q, k, v, gate, full, sparse, lse_full, lse_sparse)
        ctx.g, ctx.scale, ctx.trunk = g, scale, trunk
        return out, loss.float() if g.work == torch.float32 else loss

    @staticmethod
    def backward(ctx, d_out, d_loss):
        q, k, v, gate, full, sparse, lse_full, lse_sparse = ctx.saved_tensors
        g, scale = ctx.g, ctx.scale
        k_h, v_h = _per_head(k, g.work), _per_head(v, g.work)
        gate_w, full_w, sparse_w = gate[..., None].to(g.work), full.to(g.work), sparse.to(g.work)
        d_full = ((full_w - sparse_w) * gate_w).clamp_(-1, 1).mul_(d_loss.to(g.work) / full.numel())
        d_sparse = -d_full
        (d_full if ctx.trunk == "full" else d_sparse).add_(d_out.to(g.work))
        delta_full = (d_full * full_w).sum(-1, keepdim=True)
        delta_sparse = (d_sparse * sparse_w).sum(-1, keepdim=True)
        d_gate = (delta_full + delta_sparse).squeeze(-1).to(gate.dtype)
        for x in (d_full, d_sparse, delta_full, delta_sparse):
            x.mul_(gate_w)
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk, dv = (torch.zeros(k_h.shape, dtype=g.work, device=q.device) for _ in range(2))
        for tile in g.tiles():
            at = (tile.b, tile.heads, tile.cols)
            q_rows = _rows(q, tile, g, k_h.dtype)
            do_f, do_s = _rows(d_full, tile, g, g.work), _rows(d_sparse, tile, g, g.work)
            score = _scores(q_rows, k_h[at], tile, scale)
            lse_s = _rows(lse_sparse, tile, g, g.work)
            weight_s = _only_chosen(score, tile.chosen).sub_(lse_s).exp_()
            weight = score.sub_(_rows(lse_full, tile, g, g.work)).exp_()
            dv[at] += _mm(weight.to(v_h.dtype).transpose(1, 2), do_f.to(v_h.dtype))
            dv[at] += _mm(weight_s.to(v_h.dtype).transpose(1, 2), do_s.to(v_h.dtype))
            v_t = v_h[at].transpose(1, 2)
            d_score = _mm(do_f, v_t).sub_(_rows(delta_full, tile, g, g.work)).mul_(weight)
            d_score += _mm(do_s, v_t).sub_(_rows(delta_sparse, tile, g, g.work)).mul_(weight_s)
            d_score.mul_(scale)
            _store(dq, tile, g, _mm(d_score, k_h[at]))
            dk[at] += _mm(d_score.to(k_h.dtype).transpose(1, 2), q_rows)
        return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), d_gate, None, None, None


def full_attention(q, k, v, scale: float, doc_starts, query_index) -> Tensor:
    return _OneStream.apply(q, k, v, Geometry(q, k, Stream("full"), doc_starts, query_index, None), scale)


def sparse_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts, query_index, blocks) -> Tensor:
    if blocks is None:
        blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    stream = Stream("sparse", block_size=spec.block_size)
    return _OneStream.apply(q, k, v, Geometry(q, k, stream, doc_starts, query_index, blocks), scale)


def ssa_attention(q, k, v, gate, spec: BlockSpec, trunk: str, scale: float, doc_starts, query_index):
    blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    stream = Stream("both", block_size=spec.block_size)
    return _TwoStreams.apply(q, k, v, gate, Geometry(q, k, stream, doc_starts, query_index, blocks), scale, trunk)


def window_attention(q, k, v, window: int, scale: float, doc_starts, query_index) -> Tensor:
    stream = Stream("window", window=window)
    return _OneStream.apply(q, k, v, Geometry(q, k, stream, doc_starts, query_index, None), scale)


def compressed_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts, query_index) -> Tensor:
    """Autograd carries the pooling; the attention over pooled keys is one more masked stream."""
    starts_bs = slot_starts(doc_starts, k.shape[1], spec.block_size, q.device)
    kbar, vbar = (pooled_blocks(x, starts_bs, spec.block_size) for x in (k, v))
    at = torch.arange(k.shape[1], device=q.device) if query_index is None else query_index
    g = Geometry(q, kbar, Stream("pooled", block_size=spec.block_size), doc_starts, at, None)
    g.key_start = torch.where(starts_bs >= 0, starts_bs, 1 << 40)
    return _OneStream.apply(q, kbar, vbar, g, scale)


@torch.no_grad()
def attention_statistics(q, k, spec: BlockSpec, scale: float, doc_starts, query_index) -> AttentionStatistics:
    blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    g = Geometry(q, k, Stream("both", block_size=spec.block_size), doc_starts, query_index, blocks)
    inside, entropy = (torch.zeros(g.h_kv, g.h_q // g.h_kv, dtype=torch.float64, device=q.device) for _ in range(2))
    k_h = _per_head(k, g.work)
    for tile in g.tiles():
        score = _scores(_rows(q, tile, g, k_h.dtype), k_h[tile.b, tile.heads, tile.cols], tile, scale)
        log_weight = score.log_softmax(-1).unflatten(1, (g.h_q // g.h_kv, -1))
        weight = log_weight.exp()
        inside[tile.heads] += (weight * tile.chosen).sum((-1, -2)).double()
        entropy[tile.heads] -= (weight * log_weight.nan_to_num_(neginf=0.0)).sum((-1, -2)).double()
    tokens = g.batch * g.n_q
    return AttentionStatistics((inside / tokens).float().flatten(), (entropy / tokens).float().flatten())
