"""Gate, SmoothL1 alignment loss and their backward in one pass each way.

Forward reads both streams and writes the gated trunk and one partial loss per program (summed in a fixed order, so
it is repeatable); backward writes both output gradients and what the streams' own backward needs of them.
It refuses nothing: `triton_backend.py` has prepared the arguments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _forward(
    full_ptr, sparse_ptr, gate_ptr, out_ptr, loss_ptr, rows,
    D: tl.constexpr, ROWS: tl.constexpr, TRUNK_FULL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    real = row < rows
    gate = tl.load(gate_ptr + row, mask=real, other=0.0).to(tl.float32)[:, None]
    full = tl.load(full_ptr + at, mask=real[:, None], other=0.0).to(tl.float32) * gate
    sparse = tl.load(sparse_ptr + at, mask=real[:, None], other=0.0).to(tl.float32) * gate
    trunk = full if TRUNK_FULL else sparse
    tl.store(out_ptr + at, trunk.to(out_ptr.dtype.element_ty), mask=real[:, None])
    size = tl.abs(full - sparse)
    loss = tl.where(size < 1.0, 0.5 * size * size, size - 0.5)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))


@triton.jit
def _backward(
    full_ptr, sparse_ptr, gate_ptr, d_out_ptr, d_loss_ptr, do_full_ptr, do_sparse_ptr, delta_full_ptr, delta_sparse_ptr,
    d_gate_ptr, rows, count, D: tl.constexpr, ROWS: tl.constexpr, TRUNK_FULL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    real = row < rows
    gate = tl.load(gate_ptr + row, mask=real, other=0.0).to(tl.float32)
    full = tl.load(full_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
    sparse = tl.load(sparse_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
    d_out = tl.load(d_out_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
    pull = (full - sparse) * gate[:, None]
    pull = tl.minimum(tl.maximum(pull, -1.0), 1.0) * (tl.load(d_loss_ptr).to(tl.float32) / count)
    d_full = pull + d_out if TRUNK_FULL else pull
    d_sparse = -pull if TRUNK_FULL else d_out - pull
    d_gate = tl.sum(d_full * full + d_sparse * sparse, 1)
    tl.store(d_gate_ptr + row, d_gate.to(d_gate_ptr.dtype.element_ty), mask=real)
    # delta of the rounded gradients, which the streams' backward reads: where one key has all the weight, dP - delta must cancel
    do_full = (d_full * gate[:, None]).to(do_full_ptr.dtype.element_ty)
    do_sparse = (d_sparse * gate[:, None]).to(do_sparse_ptr.dtype.element_ty)
    tl.store(delta_full_ptr + row, tl.sum(do_full.to(tl.float32) * full, 1), mask=real)
    tl.store(delta_sparse_ptr + row, tl.sum(do_sparse.to(tl.float32) * sparse, 1), mask=real)
    tl.store(do_full_ptr + at, do_full, mask=real[:, None])
    tl.store(do_sparse_ptr + at, do_sparse, mask=real[:, None])


@triton.jit
def _delta(o_ptr, do_ptr, delta_ptr, rows, D: tl.constexpr, ROWS: tl.constexpr):
    """delta = rowsum(dO * O), fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = row[:, None] * D + tl.arange(0, D)[None, :]
    real = (row < rows)[:, None]
    o = tl.load(o_ptr + at, mask=real, other=0.0).to(tl.float32)
    do = tl.load(do_ptr + at, mask=real, other=0.0).to(tl.float32)
    tl.store(delta_ptr + row, tl.sum(o * do, 1), mask=row < rows)


def gate_forward(full, sparse, gate, trunk: str, count: int, rows_per_program: int) -> tuple[Tensor, Tensor]:
    """Contiguous streams [B, Nq, Hq, D] and gate [B, Nq, Hq] -> gated trunk, alignment loss (fp32 scalar).

    count: elements of the mean (a padded head dimension adds zeros to the sum, not to the count).
    """
    rows, dim = gate.numel(), full.shape[-1]
    out = torch.empty_like(full)
    programs = triton.cdiv(rows, rows_per_program)
    partial = torch.empty(programs, dtype=torch.float32, device=full.device)
    _forward[(programs,)](full, sparse, gate, out, partial, rows, dim, rows_per_program, TRUNK_FULL=trunk == "full")
    return out, partial.sum() * (2.0 / count)


def gate_backward(
    full, sparse, gate, d_out, d_loss, trunk: str, count: int, rows_per_program: int
) -> tuple[Tensor, ...]:
    """(dO_full, dO_sparse, delta_full, delta_sparse, dgate); method identities dF = clip(F - S, -1, 1) / n, dS =
    -dF."""
    rows, dim = gate.numel(), full.shape[-1]
    do_full, do_sparse = torch.empty_like(full), torch.empty_like(full)
    delta_full, delta_sparse = (torch.empty(gate.shape, dtype=torch.float32, device=full.device) for _ in range(2))
    d_gate = torch.empty_like(gate)
    _backward[(triton.cdiv(rows, rows_per_program),)](
        full, sparse, gate, d_out, d_loss, do_full, do_sparse, delta_full, delta_sparse, d_gate, rows, count, dim,
    rows_per_program, TRUNK_FULL=trunk == "full", )  # fmt: skip
    return do_full, do_sparse, delta_full, delta_sparse, d_gate


def row_delta(o: Tensor, do: Tensor, rows_per_program: int) -> Tensor:
    """rowsum(dO * O), fp32 [B, Nq, Hq]."""
    delta = torch.empty(o.shape[:3], dtype=torch.float32, device=o.device)
    _delta[(triton.cdiv(delta.numel(), rows_per_program),)](o, do, delta, delta.numel(), o.shape[-1], rows_per_program)
    return delta
