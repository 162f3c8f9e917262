"""Every stream in plain PyTorch with whole masks, in any precision: in fp64 the truth, else the error PyTorch itself makes.

That error is the yardstick where a value is the small difference of large ones. It is taken twice, because the two ways to a
softmax's gradient round differently: PyTorch's autograd keeps the weights, its fused kernels keep the rounded output and take
delta = sum(dO * O) of it, as ours do. Inputs are on one device; `[Nq, N]` scores are held, so pass few rows of long sequences.
"""

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ssa_kernels.layout import slot_count, slot_starts
from ssa_kernels.reference import oracle
from ssa_kernels.reference.torch_routing import pooled_blocks
from ssa_kernels.spec import BlockSpec

MOST = 1 << 28  # elements of one score matrix of the reference: 2 GB in fp64, of which about ten exist at once
WAYS = ("plain", "fused", "worst")  # of `reference`: oracle.attention, and two of _FusedAttention


class Masks:
    """Who may see what in one call: every mask is bool and broadcasts to `[B, Hq, Nq, N]`."""

    def __init__(self, q: Tensor, k: Tensor, spec: BlockSpec, doc_starts: Tensor | None, query_index: Tensor | None):
        self.batch, self.n, self.h_kv = k.shape[0], k.shape[1], k.shape[2]
        self.group, self.spec, self.doc_starts = q.shape[2] // k.shape[2], spec, doc_starts
        key = torch.arange(self.n, device=q.device)
        self.at = key if query_index is None else query_index.long()  # [Nq]
        start = torch.zeros_like(self.at)[None] if doc_starts is None else doc_starts.long()[:, self.at]
        self.start = start.expand(self.batch, -1)  # [B, Nq]
        self.key, self.own = key, (self.at - self.start) // spec.block_size
        self.full = ((key <= self.at[:, None]) & (key >= self.start[..., None]))[:, None]

    def of(self, group: int, h_kv: int) -> "Masks":
        """The same places, for some of the heads."""
        part = copy.copy(self)
        part.group, part.h_kv = group, h_kv
        return part

    def window(self, width: int) -> Tensor:
        return self.full & (self.key > self.at[:, None] - width)

    def sparse(self, blocks: Tensor) -> Tensor:
        """blocks [B, Nq, Hkv, count] -> bool [B, Hq, Nq, N]."""
        columns = slot_count(self.n, self.spec.block_size) + 1  # one more, for what is not selected
        chosen = torch.zeros(*blocks.shape[:3], columns, dtype=torch.bool, device=blocks.device)
        chosen.scatter_(3, torch.where(blocks >= 0, blocks, columns - 1).long(), True)
        chosen[..., -1] = False
        block_of_key = (self.key - self.start[..., None]).div(self.spec.block_size, rounding_mode="floor")
        index = block_of_key.clamp(0, columns - 2)[:, :, None].expand(-1, -1, self.h_kv, -1)
        return chosen.gather(3, index).transpose(1, 2).repeat_interleave(self.group, 1) & self.full

    def pooled(self) -> tuple[Tensor, Tensor]:
        """(block complete at the row, and also before its own block): bool [B, 1, Nq, slots]."""
        first = slot_starts(self.doc_starts, self.n, self.spec.block_size, self.key.device).expand(self.batch, -1)[
            :, None
        ]
        size, start = self.spec.block_size, self.start[..., None]
        complete = (first >= start) & (first + size <= self.at[:, None] + 1)
        return complete[:, None], (complete & (first < start + self.own[..., None] * size))[:, None]


class _FusedAttention(torch.autograd.Function):
    """`oracle.attention`, rounded where fused kernels round: the output is kept in the inputs' precision, the weights are not.

    `off`: half units in the last place by which every delta is moved, as far as rounding the output may move one.
    """

    @staticmethod
    def forward(ctx, q, k, v, mask, scale, off):
        weight = oracle.attention_weights(q.float(), k.float(), mask, scale)
        v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
        out = torch.einsum("bhnm,bmhd->bnhd", weight.to(q.dtype).float(), v.float()).to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.scale, ctx.off = scale, off * 0.5 * torch.finfo(q.dtype).eps
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, mask, out = ctx.saved_tensors
        group, dtype = q.shape[2] // k.shape[2], q.dtype
        q, wide, v, d_out = q.float(), k.float(), v.float(), d_out.float()
        weight = oracle.attention_weights(q, wide, mask, ctx.scale)
        terms = d_out * out.float()
        delta = (terms.sum(-1) + ctx.off * terms.abs().sum(-1)).transpose(1, 2)[..., None]
        d_score = (weight * (torch.einsum("bnhd,bmhd->bhnm", d_out, v) - delta)).to(dtype).float()
        d_q = torch.einsum("bhnm,bmhd->bnhd", d_score, wide.repeat_interleave(group, 2)) * ctx.scale
        d_k = torch.einsum("bhnm,bnhd->bmhd", d_score, q) * ctx.scale
        d_v = torch.einsum("bhnm,bnhd->bmhd", weight.to(dtype).float(), d_out)
        d_k, d_v = (x.unflatten(2, (-1, group)).sum(3).to(dtype) for x in (d_k, d_v))
        return d_q.to(dtype), d_k, d_v, None, None, None


class Streams:
    """Every stream of one call in plain PyTorch, in the dtype of its inputs; the two main ones are made once and shared.

    `count`: elements of the loss's mean, which may be more than the rows that are here.
    """

    def __init__(self, leaves: Sequence[Tensor], masks: Masks, blocks: Tensor, scale: float, count: int, way: str):
        self.attention = oracle.attention if way == "plain" else self._fused
        self.off = float(way == "worst")
        self.q, self.k, self.v, self.gate = leaves
        self.masks, self.scale, self.count = masks, scale, count
        self.full = self.attention(self.q, self.k, self.v, masks.full, scale)
        self.sparse = self.attention(self.q, self.k, self.v, masks.sparse(blocks), scale)

    def _fused(self, *arguments) -> Tensor:
        return _FusedAttention.apply(*arguments, self.off)

    def window(self, width: int) -> Tensor:
        return self.attention(self.q, self.k, self.v, self.masks.window(width), self.scale)

    def compressed(self) -> Tensor:
        size = self.masks.spec.block_size
        kbar, vbar = (pooled_blocks(x, self.masks.doc_starts, size) for x in (self.k, self.v))
        return self.attention(self.q, kbar, vbar, self.masks.pooled()[0], self.scale)

    def ssa(self, trunk: str) -> tuple[Tensor, Tensor]:
        full, sparse = (self.gate.to(x.dtype)[..., None] * x for x in (self.full, self.sparse))
        wide = torch.promote_types(full.dtype, torch.float32)  # a sum over all elements overflows half precision
        f, s = full.to(wide), sparse.to(wide)
        loss = F.smooth_l1_loss(f, s.detach(), reduction="sum") + F.smooth_l1_loss(f.detach(), s, reduction="sum")
        return (full if trunk == "full" else sparse), loss / self.count


def results(call: Callable, leaves: Sequence[Tensor], upstream: Tensor, loss_weight: float, keep: bool = False):
    """(outputs, gradients of the used leaves) of one call; a tuple is (output, alignment loss)."""
    outputs = call()
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [upstream.to(outputs[0].dtype), *(torch.full_like(x, loss_weight) for x in outputs[1:])]
    used = leaves if len(outputs) > 1 else leaves[:3]
    if not outputs[0].requires_grad:
        return outputs, [torch.zeros_like(x) for x in used]
    grads = torch.autograd.grad(outputs, used, seeds, retain_graph=keep, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in outputs], list(grads)


def reference(
    names: Sequence[str], leaves: Sequence[Tensor], upstream: Tensor, masks: Masks, blocks: Tensor, scale: float,
    loss_weight: float, dtype: torch.dtype, trunk: str = "full", width: int = 1, count: int | None = None, way: str = "plain",
) -> dict[str, tuple]:  # fmt: skip
    """`results` of the named streams ("full", "sparse", "ssa", "window", "compressed") in plain PyTorch in `dtype`.

    More than `MOST` scores are made a few query heads at a time, whose gradients of k and v are then added in fp64.
    """
    leaves = [x.detach().to(dtype) for x in leaves]
    q, k, v, gate = leaves
    each = max(1, MOST // (q.shape[0] * q.shape[1] * k.shape[1]))
    fixed = scale, loss_weight, trunk, width, count or q.numel(), way
    if each >= q.shape[2]:
        return _reference(names, leaves, upstream, masks, blocks, *fixed)
    parts = []
    for h in range(k.shape[2]):
        for lo in range(h * masks.group, (h + 1) * masks.group, each):
            heads, kv = slice(lo, min(lo + each, (h + 1) * masks.group)), slice(h, h + 1)
            part = [q[:, :, heads], k[:, :, kv], v[:, :, kv], gate[:, :, heads]]
            view = masks.of(heads.stop - heads.start, 1)
            parts.append((h, _reference(names, part, upstream[:, :, heads], view, blocks[:, :, kv], *fixed)))
    return {name: _joined([(h, part[name]) for h, part in parts], k.shape[2]) for name in names}


def yardsticks(names: Sequence[str], *inputs, dtype: torch.dtype, ways=WAYS[:2], **kinds) -> dict[str, list[tuple]]:
    """PyTorch itself in `dtype`, each way: {stream: what `errors` takes as `own`}. Arguments are `reference`'s.

    `ways=WAYS` is for inputs drawn at random by the thousand: where one row has all of an error, how its output happened to be
    rounded is a draw, and no small multiple of another draw bounds it; "worst" does.
    """
    found = [reference(names, *inputs, dtype, way=way, **kinds) for way in ways]
    return {name: [results[name] for results in found] for name in names}


def _reference(
    names, leaves, upstream, masks, blocks, scale, loss_weight, trunk, width, count, way
) -> dict[str, tuple]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    streams = Streams(leaves, masks, blocks, scale, count, way)
    calls = {
        "full": lambda: streams.full,
        "sparse": lambda: streams.sparse,
        "ssa": lambda: streams.ssa(trunk),
        "window": lambda: streams.window(width),
        "compressed": streams.compressed,
    }
    return {name: results(calls[name], leaves, upstream, loss_weight, keep=True) for name in names}


def _joined(parts: list[tuple[int, tuple]], h_kv: int) -> tuple[list[Tensor], list[Tensor]]:
    """Results of some query heads each (with their KV head) as those of the whole call."""
    outputs = [torch.cat([outputs[0] for _, (outputs, _) in parts], 2)]
    if len(parts[0][1][0]) > 1:
        outputs.append(sum(outputs[1] for _, (outputs, _) in parts))
    grads = []
    for i in range(len(parts[0][1][1])):
        pieces = [(h, grads[i]) for h, (_, grads) in parts]
        if i in (1, 2):
            grads.append(torch.cat([sum(x.double() for h, x in pieces if h == head) for head in range(h_kv)], 2))
        else:
            grads.append(torch.cat([x for _, x in pieces], 2))
    return outputs, grads
