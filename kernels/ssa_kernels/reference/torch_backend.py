"""The streams in memory-lean PyTorch: a chunk of queries at a time, scores recomputed in backward, statistics in fp32.

Activations kept for backward are O(N * D); full and sparse streams share one score matrix, and no key that causality
or the document puts out of a chunk's reach is read where that is known without synchronising a GPU.
It refuses nothing: `checks.py` has seen the arguments.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa_kernels.autograd import first_order, unchanged
from ssa_kernels.layout import key_slots, slot_count, slot_starts
from ssa_kernels.reference.torch_routing import pooled_blocks, select_blocks
from ssa_kernels.spec import AttentionStatistics, BlockSpec

NEG_INF = float("-inf")
UNSAFE = 1e-20  # a sparse row sum this far below the full maximum is recomputed with its own maximum (fp32 underflow)
SAFE_GAP = 40.0  # nats between the two log-sum-exps up to which the sparse weights are rescaled full weights


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
    chosen: Tensor | None  # [heads, 1, rows, cols]: 1 or 0, inside or outside the selected blocks (0 or -inf alone)


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
            start = self.key_start[b if self.doc_starts is not None else 0]
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
        """`Tile.chosen`: where the key's block is selected (causality and documents are the affair of `hidden`)."""
        size, slots = self.stream.block_size, slot_count(self.n_k, self.stream.block_size)
        block = self.blocks[b, rows, h].transpose(0, 1).long()  # [heads, rows, count]
        if self.doc_starts is not None:
            base = self.doc_starts[b].long()[self.at[rows]] // size
            slot = torch.where(block >= 0, block + base[:, None], slots)
        else:
            slot = torch.where(block >= 0, block, slots)
        # A stream of its own adds the mask to its scores; beside the full stream it multiplies the shared weights.
        outside, inside = (NEG_INF, 0.0) if self.stream.kind == "sparse" else (0.0, 1.0)
        mask = torch.full((*block.shape[:2], slots + 1), outside, dtype=self.work, device=self.device)
        mask.scatter_(2, slot.clamp_(max=slots), inside)
        if self.doc_starts is None:
            first, last = cols.start // size, -(-cols.stop // size)
            wide = mask[..., first:last, None].expand(-1, -1, -1, size).flatten(2)
            return wide[..., cols.start - first * size : cols.stop - first * size][:, None]
        return mask.index_select(2, slot_of_key[cols])[:, None]


class Workspace:
    """Named buffers that tiles reuse: fresh pages for every temporary cost a CPU more than the arithmetic on them."""

    def __init__(self, device: torch.device):
        self.device, self.flat = device, {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        flat = self.flat.get(name)
        if flat is None or flat.numel() < size or flat.dtype != dtype:
            flat = self.flat[name] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)


def _per_head(x_bnhd: Tensor, work: torch.dtype) -> Tensor:
    """[B, Hkv, N, D], contiguous, in the work dtype."""
    return x_bnhd.transpose(1, 2).to(work).contiguous()


def _rows(x_bnhd: Tensor, tile: Tile, g: Geometry, work: torch.dtype) -> Tensor:
    """The tile's query-side rows as [heads, G * rows, D]."""
    group = g.h_q // g.h_kv
    x = x_bnhd[tile.b, tile.rows, tile.heads.start * group : tile.heads.stop * group]
    return x.unflatten(1, (-1, group)).permute(1, 2, 0, 3).flatten(1, 2).to(work)


def _store(out_bnhd: Tensor, tile: Tile, g: Geometry, x: Tensor) -> None:
    """Inverse of `_rows`."""
    group = g.h_q // g.h_kv
    n = tile.rows.stop - tile.rows.start
    place = out_bnhd[tile.b, tile.rows, tile.heads.start * group : tile.heads.stop * group]
    place.copy_(x.unflatten(1, (group, n)).permute(2, 0, 1, 3).flatten(1, 2))


def _mm(a: Tensor, b: Tensor, space: Workspace | None = None, name: str = "") -> Tensor:
    """Batched product, in the named buffer if one is given."""
    if space is None:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out=space.get(name, (a.shape[0], a.shape[1], b.shape[2]), b.dtype))


def _scores(q_rows: Tensor, k_cols: Tensor, tile: Tile, scale: float, space: Workspace) -> Tensor:
    """Scaled scores [heads, G * rows, cols], -inf where not visible."""
    score = _mm(q_rows * scale, k_cols.transpose(1, 2), space, "score")
    n = tile.rows.stop - tile.rows.start
    score.unflatten(1, (-1, n))[..., tile.from_col :].masked_fill_(tile.hidden, NEG_INF)
    return score


def _times_mask(weight: Tensor, chosen: Tensor, space: Workspace) -> Tensor:
    """weight [heads, G * rows, cols] where chosen, else 0."""
    out = space.get("chosen", weight.shape, weight.dtype)
    n = chosen.shape[2]
    torch.mul(weight.unflatten(1, (-1, n)), chosen, out=out.unflatten(1, (-1, n)))
    return out


def _only_chosen(score: Tensor, chosen: Tensor) -> Tensor:
    """Scores with -inf outside the chosen blocks, as a new tensor."""
    return score.unflatten(1, (-1, chosen.shape[2])).masked_fill(chosen == 0, NEG_INF).flatten(1, 2)


def _softmax_parts(score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(score - max) in place, its sum and the log-sum-exp [.., 1]; an empty row gives zeros and +inf."""
    top = score.amax(-1, keepdim=True).nan_to_num_(neginf=0.0)
    weight = score.sub_(top).exp_()
    total = weight.sum(-1, keepdim=True)
    return weight, total, torch.where(total > 0, top + total.log(), -NEG_INF)


def _normalised(weight: Tensor, total: Tensor, v_cols: Tensor) -> Tensor:
    return _mm(weight, v_cols) / total.clamp(min=torch.finfo(total.dtype).tiny)


class _OneStream(torch.autograd.Function):
    """Softmax attention over one mask; saves q, k, v, the output and its log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v, g: Geometry, scale: float):
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty(*q.shape[:3], 1, dtype=g.work, device=q.device)
        k_h, v_h, space = _per_head(k, g.work), _per_head(v, g.work), Workspace(q.device)
        for tile in g.tiles():
            score = _scores(_rows(q, tile, g, g.work), k_h[tile.b, tile.heads, tile.cols], tile, scale, space)
            if tile.chosen is not None:
                score.unflatten(1, (-1, tile.chosen.shape[2])).add_(tile.chosen)
            weight, total, lse_rows = _softmax_parts(score)
            _store(out, tile, g, _normalised(weight, total, v_h[tile.b, tile.heads, tile.cols]))
            _store(lse, tile, g, lse_rows)
        ctx.save_for_backward(q, k, v, out, lse, *unchanged(g.doc_starts, g.blocks))
        ctx.g, ctx.scale = g, scale
        return out

    @staticmethod
    @first_order
    def backward(ctx, d_out):
        q, k, v, out, lse, *_ = ctx.saved_tensors
        g, scale = ctx.g, ctx.scale
        k_h, v_h, space = _per_head(k, g.work), _per_head(v, g.work), Workspace(q.device)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        dk, dv = (torch.zeros(k_h.shape, dtype=g.work, device=q.device) for _ in range(2))
        for tile in g.tiles():
            at = (tile.b, tile.heads, tile.cols)
            q_rows, do_rows = _rows(q, tile, g, g.work), _rows(d_out, tile, g, g.work)
            delta = (do_rows * _rows(out, tile, g, g.work)).sum(-1, keepdim=True)
            score = _scores(q_rows, k_h[at], tile, scale, space)
            if tile.chosen is not None:
                score.unflatten(1, (-1, tile.chosen.shape[2])).add_(tile.chosen)
            weight = score.sub_(_rows(lse, tile, g, g.work)).exp_()
            dv[at] += _mm(weight.transpose(1, 2), do_rows)
            d_score = _mm(do_rows, v_h[at].transpose(1, 2), space, "d_score").sub_(delta).mul_(weight)
            _store(dq, tile, g, _mm(d_score, k_h[at]).mul_(scale))
            dk[at] += _mm(d_score.transpose(1, 2), q_rows * scale)
        return dq, dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype), None, None


class _TwoStreams(torch.autograd.Function):
    """Both streams, the gate and the alignment loss (method identities: dF = clip(F - S, -1, 1) / n, dS = -dF)."""

    @staticmethod
    def forward(ctx, q, k, v, gate, g: Geometry, scale: float, trunk: str):
        full, sparse, out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
        lse_full, lse_sparse = (torch.empty(*q.shape[:3], 1, dtype=g.work, device=q.device) for _ in range(2))
        k_h, v_h, space = _per_head(k, g.work), _per_head(v, g.work), Workspace(q.device)
        loss = torch.zeros((), dtype=g.work, device=q.device)
        for tile in g.tiles():
            at = (tile.b, tile.heads, tile.cols)
            weight, lse, total, weight_s, lse_s, total_s = _both_weights(q, k_h[at], tile, g, scale, space)
            o_full, o_sparse = _normalised(weight, total, v_h[at]), _normalised(weight_s, total_s, v_h[at])
            for place, x in ((full, o_full), (sparse, o_sparse), (lse_full, lse), (lse_sparse, lse_s)):
                _store(place, tile, g, x)
            gate_rows = _rows(gate[..., None], tile, g, g.work)
            _store(out, tile, g, (o_full if trunk == "full" else o_sparse) * gate_rows)
            difference = o_full.to(q.dtype).to(g.work).sub_(o_sparse.to(q.dtype)).mul_(gate_rows)
            loss += F.smooth_l1_loss(difference, difference.new_zeros(()).expand_as(difference), reduction="sum")
        saved = unchanged(g.doc_starts, g.blocks)
        ctx.save_for_backward(q, k, v, gate, full, sparse, lse_full, lse_sparse, *saved)
        ctx.g, ctx.scale, ctx.trunk = g, scale, trunk
        return out, loss * (2 / q.numel())

    @staticmethod
    @first_order
    def backward(ctx, d_out, d_loss):
        q, k, v, gate, full, sparse, lse_full, lse_sparse, *_ = ctx.saved_tensors
        g, scale = ctx.g, ctx.scale
        k_h, v_h, space = _per_head(k, g.work), _per_head(v, g.work), Workspace(q.device)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        d_gate = torch.empty(*gate.shape, 1, dtype=gate.dtype, device=q.device)
        dk, dv = (torch.zeros(k_h.shape, dtype=g.work, device=q.device) for _ in range(2))
        d_mean = d_loss.to(g.work) / q.numel()
        for tile in g.tiles():
            at = (tile.b, tile.heads, tile.cols)
            q_rows = _rows(q, tile, g, g.work)
            o_f, o_s, gate_rows = (_rows(x, tile, g, g.work) for x in (full, sparse, gate[..., None]))
            do_f = (o_f - o_s).mul_(gate_rows).clamp_(-1, 1).mul_(d_mean)
            do_s = -do_f
            (do_f if ctx.trunk == "full" else do_s).add_(_rows(d_out, tile, g, g.work))
            delta_f, delta_s = (do_f * o_f).sum(-1, keepdim=True), (do_s * o_s).sum(-1, keepdim=True)
            _store(d_gate, tile, g, delta_f + delta_s)
            for x in (do_f, do_s, delta_f, delta_s):
                x.mul_(gate_rows)
            score = _scores(q_rows, k_h[at], tile, scale, space)
            lse_f, lse_s = _rows(lse_full, tile, g, g.work), _rows(lse_sparse, tile, g, g.work)
            gap = lse_f - lse_s
            if g.on_cpu and bool((gap < SAFE_GAP).all()):
                # P_sparse = P_full * chosen * exp(gap): no second exponential; exp(gap) goes into the narrow side.
                weight = score.sub_(lse_f).exp_()
                weight_s = _times_mask(weight, tile.chosen, space)
                ratio = gap.exp_()
                do_s, delta_s = do_s.mul_(ratio), delta_s.mul_(ratio)
            else:
                weight_s = _only_chosen(score, tile.chosen).sub_(lse_s).exp_()
                weight = score.sub_(lse_f).exp_()
            dv[at] += _mm(weight.transpose(1, 2), do_f)
            dv[at] += _mm(weight_s.transpose(1, 2), do_s)
            v_t = v_h[at].transpose(1, 2)
            d_score = _mm(do_f, v_t, space, "d_score").sub_(delta_f).mul_(weight)
            d_score.addcmul_(_mm(do_s, v_t, space, "d_score_sparse").sub_(delta_s), weight_s)
            _store(dq, tile, g, _mm(d_score, k_h[at]).mul_(scale))
            dk[at] += _mm(d_score.transpose(1, 2), q_rows * scale)
        d_k, d_v = dk.transpose(1, 2).to(k.dtype), dv.transpose(1, 2).to(v.dtype)
        return dq, d_k, d_v, d_gate.squeeze(-1), None, None, None


def _both_weights(q: Tensor, k_cols: Tensor, tile: Tile, g: Geometry, scale: float, space: Workspace):
    """(weights, log-sum-exp, sum) of the full and of the sparse stream, from one score matrix."""
    q_rows = _rows(q, tile, g, g.work)
    if g.on_cpu:
        score = _scores(q_rows, k_cols, tile, scale, space)
        top = score.amax(-1, keepdim=True)
        weight = score.sub_(top).exp_()
        weight_s = _times_mask(weight, tile.chosen, space)
        total, total_s = weight.sum(-1, keepdim=True), weight_s.sum(-1, keepdim=True)
        if bool((total_s > UNSAFE).all()):
            return weight, top + total.log(), total, weight_s, top + total_s.log(), total_s
    score = _scores(q_rows, k_cols, tile, scale, space)
    weight_s, total_s, lse_s = _softmax_parts(_only_chosen(score, tile.chosen))
    weight, total, lse = _softmax_parts(score)
    return weight, lse, total, weight_s, lse_s, total_s


def full_attention(q, k, v, scale: float, doc_starts, query_index) -> Tensor:
    return _OneStream.apply(q, k, v, Geometry(q, k, Stream("full"), doc_starts, query_index, None), scale)


def sparse_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts, query_index, blocks) -> Tensor:
    if blocks is None:
        blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    stream = Stream("sparse", block_size=spec.block_size)
    return _OneStream.apply(q, k, v, Geometry(q, k, stream, doc_starts, query_index, blocks), scale)


def ssa_attention(q, k, v, gate, spec: BlockSpec, trunk: str, scale: float, doc_starts, query_index, blocks):
    if blocks is None:
        blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    stream = Stream("both", block_size=spec.block_size)
    return _TwoStreams.apply(q, k, v, gate, Geometry(q, k, stream, doc_starts, query_index, blocks), scale, trunk)


def window_attention(q, k, v, window: int, scale: float, doc_starts, query_index) -> Tensor:
    stream = Stream("window", window=window)
    return _OneStream.apply(q, k, v, Geometry(q, k, stream, doc_starts, query_index, None), scale)


def compressed_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts, query_index) -> Tensor:
    """Autograd carries the pooling; the attention over pooled keys is one more masked stream."""
    starts_bs = slot_starts(doc_starts, k.shape[1], spec.block_size, q.device)
    kbar, vbar = (pooled_blocks(x, doc_starts, spec.block_size) for x in (k, v))
    at = torch.arange(k.shape[1], device=q.device) if query_index is None else query_index
    g = Geometry(q, kbar, Stream("pooled", block_size=spec.block_size), doc_starts, at, None)
    g.key_start = torch.where(starts_bs >= 0, starts_bs, 1 << 40)
    return _OneStream.apply(q, kbar, vbar, g, scale)


@torch.no_grad()
def attention_statistics(q, k, spec: BlockSpec, scale: float, doc_starts, query_index) -> AttentionStatistics:
    blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    g = Geometry(q, k, Stream("both", block_size=spec.block_size), doc_starts, query_index, blocks)
    inside, entropy = (torch.zeros(g.h_kv, g.h_q // g.h_kv, dtype=torch.float64, device=q.device) for _ in range(2))
    k_h, space = _per_head(k, g.work), Workspace(q.device)
    for tile in g.tiles():
        score = _scores(_rows(q, tile, g, g.work), k_h[tile.b, tile.heads, tile.cols], tile, scale, space)
        log_weight = score.log_softmax(-1).unflatten(1, (g.h_q // g.h_kv, -1))
        weight = log_weight.exp()
        inside[tile.heads] += (weight * tile.chosen).sum((-1, -2)).double()
        entropy[tile.heads] -= (weight * log_weight.nan_to_num_(neginf=0.0)).sum((-1, -2)).double()
    tokens = g.batch * g.n_q
    return AttentionStatistics((inside / tokens).float().flatten(), (entropy / tokens).float().flatten())
