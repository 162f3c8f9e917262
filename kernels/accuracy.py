"""What "correct" means here, in one place: the truth, the tolerances, and the verdict.

Tests, the fuzzer and the benchmark's gate all judge by this file, so that there is one tolerance everywhere. The truth is plain
PyTorch with whole masks, in fp64; the same text in the kernels' precision gives "PyTorch's own error", the yardstick where a
value is the small difference of large ones. It is taken twice, because the two ways to a softmax's gradient round differently:
PyTorch's autograd keeps the weights, its fused kernels keep the rounded output and take delta = sum(dO * O) of it, as ours do.
It takes inputs on one device, never synchronises before `verdict`, and holds `[Nq, N]` scores: pass few rows of long sequences.
"""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import oracle
from .layout import slot_count, slot_starts
from .spec import BlockSpec
from .torch_routing import pooled_blocks

HALF = (torch.float16, torch.bfloat16)
NORM = {"output": 5e-3, "gradient": 1e-2}  # of the truth's norm, half precision
NORM_FP32 = 2e-5  # three tf32 products keep this where logits stay below `CALM` nats
CALM = 16.0
WORST = {"output": 2.0, "gradient": 3.0}  # times the largest error of PyTorch itself in the same precision
WAYS = ("plain", "fused", "worst")  # of `reference`: oracle.attention, and two of _FusedAttention
NORM_OF_OWN = {
    True: 1.5,
    False: 8.0,
}  # times the norm of PyTorch's own error: half precision; fp32 made of three tf32 products
MOST = 1 << 28  # elements of one score matrix of the reference: 2 GB in fp64, of which about ten exist at once
TIE = 1e-5  # block scores this close may be chosen either way (times the largest pooled logit, where that exceeds one nat)


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


class Error(NamedTuple):
    """One tensor against the truth, before anybody looked at it: `numbers` is fp64 [6] on the device."""

    what: str
    kind: str  # "output" | "gradient"
    dtype: torch.dtype
    numbers: (
        Tensor  # norm of the error, and of PyTorch's own, over the truth's; largest, and own; largest truth; finite
    )


def errors(what: str, got, truth, own: Sequence, dtype: torch.dtype) -> list[Error]:
    """`got`, `truth`, and each of `own`: (outputs, gradients) as `results` returns. Without `own` PyTorch's errors count as
    zero: the strictest verdict, so that what passes need not be judged again."""
    found = []
    for place, kind in enumerate(NORM):
        for i, (ours, right) in enumerate(zip(got[place], truth[place], strict=True)):
            theirs = [x[place][i] for x in own]
            least = _of_equal_streams(truth[0][0], dtype) if kind == "output" and i else None
            found.append(Error(f"{what} {kind} {i}", kind, dtype, _numbers(ours, right, theirs, least)))
    return found


def _of_equal_streams(trunk: Tensor, dtype: torch.dtype) -> Tensor:
    """The alignment loss of two streams that differ by their rounding alone: what a loss can be known to."""
    unit = 0.5 * torch.finfo(dtype).eps if dtype in HALF else NORM_FP32
    return unit**2 * trunk.double().square().mean()


def _numbers(got: Tensor, truth: Tensor, own: Sequence[Tensor], least: Tensor | None) -> Tensor:
    truth = truth.double()
    norm, unit, largest = truth.norm(), truth.numel() ** 0.5, truth.abs().amax()
    if least is None:
        zero = norm <= 1e-6 * unit  # of a truth of zero (a document of one token has no dq) errors count per element
        size = torch.where(zero, torch.full_like(norm, unit), norm)
        largest = torch.where(zero, torch.ones_like(largest), largest)
    else:
        size, largest = torch.maximum(norm, least).clamp(min=1e-300), torch.maximum(largest, least)

    def of(x: Tensor) -> Tensor:
        error = x.double() - truth
        return torch.stack([error.norm() / size, error.abs().amax()])

    ours, theirs = of(got), torch.zeros(2, dtype=torch.float64, device=truth.device)
    if least is not None:
        theirs = torch.stack([least / size, least])
    for x in own:
        theirs = torch.maximum(theirs, of(x))
    return torch.stack([ours[0], theirs[0], ours[1], theirs[1], largest, torch.isfinite(got).all().double()])


class Verdict(NamedTuple):
    """What an `Error` came to: `of_norm` and `of_worst` are shares of what is allowed; above one is a failure."""

    what: str
    of_norm: float
    of_worst: float
    text: str

    @property
    def failed(self) -> bool:
        return not (self.of_norm <= 1.0 and self.of_worst <= 1.0)


def verdicts(found: Sequence[Error], logit: float = 0.0) -> list[Verdict]:
    """The one host synchronisation. `logit`: the call's largest logit in nats; it scales what fp32 is allowed.

    Half precision: the error's norm within `NORM`, or within `NORM_OF_OWN` times PyTorch's own where that is larger (a softmax
    that is nearly one-hot has gradients far below the rounding of what they are the difference of); the largest error within
    `WORST` times PyTorch's own, which counts as at least one unit in the last place of the largest true element, so that a lucky
    zero fails nobody. fp32: the norm alone.
    """
    if not found:
        return []
    rows = torch.stack([e.numbers for e in found]).tolist()
    return [_verdict(error, row, logit) for error, row in zip(found, rows, strict=True)]


def _verdict(error: Error, row: list[float], logit: float) -> Verdict:
    norm, own_norm, worst, own_worst, largest, finite = row
    if not finite:
        return Verdict(error.what, float("inf"), float("inf"), f"{error.what}: not finite")
    if error.dtype not in HALF:
        allowed = max(NORM_FP32 * max(1.0, logit / CALM), NORM_OF_OWN[False] * own_norm)
        return Verdict(error.what, norm / allowed, 0.0, f"{error.what}: norm {norm:.1e}, allowed {allowed:.1e}")
    allowed = max(NORM[error.kind], NORM_OF_OWN[True] * own_norm)
    reach = WORST[error.kind] * max(own_worst, torch.finfo(error.dtype).eps * largest)
    text = f"{error.what}: norm {norm:.1e}, allowed {allowed:.1e}; largest {worst:.1e}, allowed {reach:.1e}"
    return Verdict(error.what, norm / allowed, worst / reach, text)


class Selection(NamedTuple):
    """How a selection compares with fp64's: `malformed` rows break its form, `gap` is the worst score given away."""

    malformed: Tensor  # count, on the device
    gap: Tensor  # largest (best unchosen - worst chosen) over the allowed tie; above one is a failure


def selection(blocks: Tensor, q: Tensor, k: Tensor, masks: Masks, scale: float) -> Selection:
    """blocks int32 [B, Nq, Hkv, count], of q, k in any dtype: own block first, the others ascending, then -1, and the best."""
    spec, size = masks.spec, masks.spec.block_size
    q, k = q.detach().double(), k.detach().double()
    kbar = pooled_blocks(k, masks.doc_starts, size)
    complete, candidate = masks.pooled()
    logit = torch.einsum("bnhgd,bshd->bhgns", q.unflatten(2, (masks.h_kv, -1)), kbar) * scale
    weight = logit.masked_fill(~complete[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    score = weight.sum(2)  # [B, Hkv, Nq, slots]
    tie = TIE * logit.masked_fill(~complete[:, None], 0.0).abs().amax((2, 4)).clamp(min=1.0)  # [B, Hkv, Nq]
    others, own = blocks[..., 1:].long(), masks.own[..., None]  # [B, Nq, Hkv, count - 1], [B, Nq, 1]
    valid = others >= 0
    bad = blocks[..., 0] != own
    bad = (
        bad
        | ((others >= own[..., None]) & valid).any(-1)
        | (valid[..., 1:] & (others[..., 1:] <= others[..., :-1])).any(-1)
    )
    bad = bad | (valid[..., 1:] & ~valid[..., :-1]).any(-1)
    slots = score.shape[-1]
    base = (masks.start // size)[..., None, None]  # the slot of the document's first block
    place = torch.where(valid, others + base, slots).clamp(max=slots).transpose(1, 2)  # [B, Hkv, Nq, count - 1]
    chosen = torch.zeros(*score.shape[:3], slots + 1, dtype=torch.bool, device=q.device).scatter_(3, place, True)[
        ..., :slots
    ]
    candidate = candidate.expand(-1, masks.h_kv, -1, -1)
    gap = torch.zeros_like(tie)
    for part, most in _parts(candidate, base.transpose(1, 2), masks.own[:, None], spec):
        mine = chosen & part
        bad = bad | (mine.sum(-1) != part.sum(-1).clamp(max=most)).transpose(1, 2)
        worst = score.masked_fill(~mine, float("inf")).amin(-1)
        best = score.masked_fill(~part | mine, float("-inf")).amax(-1)
        gap = torch.maximum(gap, (best - worst) / tie)
    return Selection(bad.sum(), gap.amax())


def _parts(candidate: Tensor, base: Tensor, own: Tensor, spec: BlockSpec):
    """(candidates, how many of them are chosen): one part, or the authors' two past the first 16 blocks."""
    if spec.topk == "exact":
        yield candidate, torch.tensor(spec.block_count - 1, device=candidate.device)
        return
    edge = own // 16 * 16  # [B, 1, Nq]
    early = (torch.arange(candidate.shape[-1], device=candidate.device) - base) < edge[..., None]
    yield candidate & early, torch.where(edge > 0, 8, 0)
    yield candidate & ~early, torch.where(edge > 0, 7, 15)


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
