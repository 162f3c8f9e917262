"""What "correct" means here, in one place: the tolerances and the verdict, of what `masked.py` computes.

Tests, the fuzzer and the benchmark's gate all judge by this file, so that there is one tolerance everywhere. It takes tensors on
one device and never synchronises before `verdicts`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssa_kernels.reference.masked import Masks
from ssa_kernels.reference.torch_routing import pooled_blocks
from ssa_kernels.spec import BlockSpec

HALF = (torch.float16, torch.bfloat16)
NORM = {"output": 5e-3, "gradient": 1e-2}  # of the truth's norm, half precision
NORM_FP32 = 2e-5  # three tf32 products keep this where logits stay below `CALM` nats
CALM = 16.0
WORST = {"output": 2.0, "gradient": 3.0}  # times the largest error of PyTorch itself in the same precision
NORM_OF_OWN = 1.5  # times the norm of PyTorch's own error, half precision
NORM_OF_OWN_FP32 = 8.0  # the same: three tf32 products carry 21 bits, not 24
TIE = 1e-5  # block scores this close may be chosen either way (times the largest pooled logit, where that exceeds one nat)


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
        allowed = max(NORM_FP32 * max(1.0, logit / CALM), NORM_OF_OWN_FP32 * own_norm)
        return Verdict(error.what, norm / allowed, 0.0, f"{error.what}: norm {norm:.1e}, allowed {allowed:.1e}")
    allowed = max(NORM[error.kind], NORM_OF_OWN * own_norm)
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
    """(candidates, how many of them are chosen): one part, or the reference rule's two past the first 16 blocks."""
    if spec.topk == "exact":
        yield candidate, torch.tensor(spec.block_count - 1, device=candidate.device)
        return
    edge = own // 16 * 16  # [B, 1, Nq]
    early = (torch.arange(candidate.shape[-1], device=candidate.device) - base) < edge[..., None]
    yield candidate & early, torch.where(edge > 0, 8, 0)
    yield candidate & ~early, torch.where(edge > 0, 7, 15)
