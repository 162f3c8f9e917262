"""What a fuzz case is: a drawn configuration (what Triton compiles for), a drawn case of it, and the check of every stream.

A case follows from (seed, configuration, number) alone, so that any failure can be run again by itself. Triton compiles once
per configuration: heads, head size, blocks, flags, dtype and the divisibility of the length are fixed there; length, batch,
documents, places and contents are the case's. It refuses nothing; the judge is `ssa_kernels.reference.accuracy`.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

import ssa_kernels
from ssa_kernels import BlockSpec
from ssa_kernels.reference import accuracy, masked

MOST = 14_000_000  # elements of one [B, Hq, Nq, N] score matrix of the reference: 112 MB in fp64
LONGEST = 2000
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
GAPS = (40.0, 90.0, 120.0)


@dataclass(frozen=True)
class Configuration:
    group: int
    h_kv: int
    dim: int
    spec: BlockSpec
    dtype: str
    documents: bool
    places: str  # "" (every row in order), "shard" (a contiguous part) or "scattered"
    lengths: str  # "odd", "whole" (multiples of 16), "short" (at most a block) or "one"
    trunk: str
    extra: str  # "window" or "compressed": the nsa stream that is checked besides full, sparse and ssa
    width: int

    def vendor(self) -> bool:
        """Whether full attention goes to the vendor's kernel, which plans anew for every length."""
        return not self.documents and not self.places and self.dim == 128 and self.dtype != "fp32"  # at these lengths


@dataclass(frozen=True)
class Case:
    batch: int
    n: int
    rows: int  # query rows; n without query_index
    documents: str  # "", "ones", "one" or "random"
    sharpness: float
    gap: float
    poison: bool
    seed: int


def draw_configuration(seed: int, index: int, tiny: bool = False) -> Configuration:
    rng = random.Random(f"configuration {seed} {index} {tiny}")
    group = rng.choice((1, 2, 4, 8, 16, 16, 32, 3, 5, 6, 12))
    spec = BlockSpec(rng.choice((16, 16, 16, 32, 64, 128, 24)), rng.choice((16, 16, 1, 2, 3, 4, 8, 12, 17, 33, 64)))
    if rng.random() < 0.08:
        spec = BlockSpec(topk="reference")
    dim = rng.choice((64, 64, 64, 64, 128, 128, 128, 16, 32, 80, 96, 40, 256))
    c = Configuration(
        group=group,
        h_kv=rng.choice((1, 2) if group > 8 else (1, 2, 3, 4)),
        dim=dim,
        spec=spec,
        dtype=rng.choice(
            ("bf16", "bf16", "bf16", "fp16", "fp32" if dim < 256 else "fp16")
        ),  # wide fp32 compiles for minutes
        documents=rng.random() < 0.55,
        places=rng.choice(("", "", "", "shard", "scattered")),
        lengths=rng.choice(("odd", "odd", "odd", "odd", "whole", "whole", "short", "one")),
        trunk=rng.choice(("full", "sparse")),
        extra=rng.choice(("window", "compressed")),
        width=rng.choice((1, 17, 100, 128)),
    )
    if tiny:
        sizes = {"group": min(group, 3), "h_kv": 1, "dim": 16, "dtype": "fp32", "width": 5}
        c = Configuration(**{**vars(c), **sizes, "spec": BlockSpec(rng.choice((4, 8)), rng.choice((1, 2, 3)))})
    return c


def draw_case(c: Configuration, seed: int, index: int, number: int, tiny: bool = False) -> Case:
    rng = random.Random(f"case {seed} {index} {number} {tiny}")
    longest, batch = (40, 1) if tiny else (LONGEST, rng.choice((1, 1, 2, 3)))
    h_q = c.group * c.h_kv
    part = 1.0 if not c.places else rng.uniform(0.05, 0.95)
    longest = min(longest, int((MOST / (batch * h_q * part)) ** 0.5))
    pool = random.Random(f"lengths {seed} {index}") if c.vendor() else rng
    n = [_length(c, longest, pool) for _ in range(10)][number % 10]
    rows = max(1, int(part * n)) if c.places else n
    rows = rows + 1 if c.places and rows % 16 == 0 and rows < n else rows
    kind = rng.choice(("ones", "one", "random", "random", "random")) if c.documents else ""
    hard = rng.random()
    return Case(
        batch=batch, n=n, rows=rows, documents=kind,
        sharpness=1.0 if hard < 0.5 else rng.choice((4.0, 16.0)) if hard < 0.75 else 1.0,
        gap=rng.choice(GAPS) if hard >= 0.75 and n > 1 else 0.0,
        poison=not c.vendor() or rng.random() < 0.3, seed=rng.getrandbits(48),
    )  # fmt: skip


def _length(c: Configuration, longest: int, rng: random.Random) -> int:
    """Log-uniform, of one class: Triton specialises on a size (and on the count of blocks) being 1 or a multiple of 16."""
    size = c.spec.block_size
    if c.lengths == "one":
        return 1
    if c.lengths == "short":
        return rng.choice([n for n in range(2, size + 1) if n % 16]) if size > 2 else 2
    while True:
        n = min(longest, int(2 ** rng.uniform(1, longest.bit_length())))
        n = max(16, n // 16 * 16) if c.lengths == "whole" else n
        slots = -(-n // size)
        if n >= 2 and (n % 16 == 0) == (c.lengths == "whole") and slots % 16 and (slots > 1 or longest <= size):
            return n


def document_starts(case: Case, rng: torch.Generator, device: str) -> Tensor | None:
    """int32 [B, N]; random documents come with every mean length from 1 to N, another for each row."""
    if not case.documents:
        return None
    place = torch.arange(case.n, device=device, dtype=torch.int32).expand(case.batch, -1)
    if case.documents == "ones":
        return place.contiguous()
    if case.documents == "one":
        return torch.zeros_like(place)
    mean = case.n ** torch.rand(case.batch, 1, device=device, generator=rng)
    cut = torch.rand(case.batch, case.n, device=device, generator=rng) * mean < 1
    cut[:, 0] = True
    return torch.where(cut, place, 0).cummax(1).values.int()


def places(c: Configuration, case: Case, rng: torch.Generator, device: str) -> Tensor | None:
    if not c.places:
        return None
    if c.places == "shard":
        first = case.seed % (case.n - case.rows + 1)
        return torch.arange(first, first + case.rows, device=device, dtype=torch.int32)
    return torch.randperm(case.n, device=device, generator=rng)[: case.rows].int()


def inputs(c: Configuration, case: Case, device: str):
    """([q, k, v, gate], upstream, doc_starts, query_index). A gap lifts a few keys `gap` nats above the rest, and pushes their
    neighbours down so that routing, which sees block means, is likely to miss them."""
    rng, dtype = torch.Generator(device).manual_seed(case.seed), DTYPES[c.dtype]

    def normal(rows, heads):
        return torch.randn(case.batch, rows, heads, c.dim, device=device, generator=rng)

    q, upstream = (normal(case.rows, c.group * c.h_kv) for _ in range(2))
    k, v = (normal(case.n, c.h_kv) for _ in range(2))
    q *= case.sharpness
    if case.gap:
        q[..., 0], k[..., 0] = 4.0, 0.0
        lift = case.gap / (4.0 * c.dim**-0.5)
        at = torch.randint(case.n, (1 + case.n // 200,), device=device, generator=rng)
        k[:, (at + 1).clamp(max=case.n - 1), :, 0] = -lift
        k[:, at, :, 0] = lift
    gate = torch.rand(case.batch, case.rows, c.group * c.h_kv, device=device, generator=rng)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    leaves.append(gate.to(dtype if case.seed % 2 else torch.float32).requires_grad_())
    return leaves, upstream.to(dtype), document_starts(case, rng, device), places(c, case, rng, device)


@dataclass
class Outcome:
    """What one case came to: verdicts by stream, and what went wrong, in words."""

    verdicts: list[accuracy.Verdict]
    failures: list[str]


def check(c: Configuration, case: Case, device: str, judge: bool = True) -> Outcome:
    """Every stream, outputs and gradients, against fp64; `judge=False` only runs the kernels (for compute-sanitizer)."""
    leaves, upstream, docs, index = inputs(c, case, device)
    options = {"doc_starts": docs, "query_index": index, "backend": "triton"}
    scale, weight = c.dim**-0.5, 100.0 * upstream.numel() ** 0.5
    blocks, got, same = _ours(c, case, leaves, upstream, weight, options)
    if not judge:
        return Outcome([], [])
    masks = masked.Masks(*leaves[:2], c.spec, docs, index)
    fixed = upstream, masks, blocks, scale, weight
    kinds = {"trunk": c.trunk, "width": c.width}
    truth = masked.reference(tuple(got), leaves, *fixed, torch.float64, **kinds)
    dtype, own = DTYPES[c.dtype], dict.fromkeys(got, ())
    chosen = accuracy.selection(blocks, *leaves[:2], masks, scale)
    numbers = torch.stack([chosen.malformed.double(), chosen.gap.double(), same.double(), _logit(leaves, scale)])
    malformed, gap, same, logit = numbers.tolist()

    def judged() -> list[accuracy.Verdict]:
        found = [e for name in got for e in accuracy.errors(name, got[name], truth[name], own[name], dtype)]
        return accuracy.verdicts(found, logit)

    verdicts = judged()
    again = tuple({v.what.split()[0]: None for v in verdicts if v.failed})
    if again:  # PyTorch's own error can only allow more: it is computed where that matters
        own |= masked.yardsticks(again, leaves, *fixed, dtype=dtype, ways=masked.WAYS, **kinds)
        verdicts = judged()
    verdicts.append(accuracy.Verdict("selection", gap, 0.0, f"selection: gap {gap:.2g} ties"))
    failures = [v.text for v in verdicts if v.failed]
    failures += [f"selection: {malformed:.0f} malformed rows"] * (malformed > 0) + ["two runs differ"] * (not same)
    return Outcome(verdicts, failures)


def _ours(c, case, leaves, upstream, weight, options):
    """(blocks, results by stream, whether a second run gave the same bits); what no kernel writes is NaN in a poisoned case."""
    torch.use_deterministic_algorithms(case.poison, warn_only=True)
    try:
        blocks = ssa_kernels.select_blocks(*leaves[:2], c.spec, **options)
        sparse = {**options, "blocks": blocks}
        extra = (c.width,) if c.extra == "window" else (c.spec,)
        calls = {
            "full": lambda: ssa_kernels.full_attention(*leaves[:3], **options),
            "sparse": lambda: ssa_kernels.sparse_attention(*leaves[:3], c.spec, **sparse),
            c.extra: lambda: getattr(ssa_kernels, f"{c.extra}_attention")(*leaves[:3], *extra, **options),
            "ssa": lambda: ssa_kernels.ssa_attention(*leaves, c.spec, trunk=c.trunk, **options),
        }
        got = {name: masked.results(call, leaves, upstream, weight) for name, call in calls.items()}
        same = torch.ones((), dtype=torch.bool, device=blocks.device)
        if case.poison and case.seed % 16 < 2:
            again = masked.results(calls["ssa"], leaves, upstream, weight)
            for a, b in zip([*got["ssa"][0], *got["ssa"][1]], [*again[0], *again[1]], strict=True):
                same &= ((a == b) | (a.isnan() & b.isnan())).all()
        return blocks, got, same
    finally:
        torch.use_deterministic_algorithms(False)


def _logit(leaves, scale: float) -> Tensor:
    """Largest logit in nats, from above: it matters to fp32 alone."""
    q, k = (x.detach().double().norm(dim=-1).amax() for x in leaves[:2])
    return q * k * scale
