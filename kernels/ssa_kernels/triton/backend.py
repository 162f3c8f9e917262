"""The streams on a GPU: which kernel serves which call, and their autograd.

Dense attention without documents goes to the vendor's kernels through SDPA (cuDNN first, then flash), which are
faster than ours; everything else is ours. Nothing here falls back in silence: what a kernel cannot run is refused by
name.
"""

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssa_kernels.autograd import first_order, unchanged
from ssa_kernels.layout import slot_count, slot_starts
from ssa_kernels.reference.torch_routing import pooled_blocks
from ssa_kernels.spec import BlockSpec, KernelArgumentError
from ssa_kernels.triton import dense as triton_dense
from ssa_kernels.triton import dense_backward as triton_dense_backward
from ssa_kernels.triton import dual as triton_dual
from ssa_kernels.triton import dual_backward as triton_dual_backward
from ssa_kernels.triton import gate as triton_gate
from ssa_kernels.triton import routing as triton_routing
from ssa_kernels.triton import sparse as triton_sparse
from ssa_kernels.triton.dense import Dense
from ssa_kernels.triton.tiles import VENDOR_TOKENS, choose, dual

MOST_ROWS = 65535  # of a batch: a CUDA grid's third axis
MOST_SELECTED = 1 << 31  # entries of a selection, which the inverse index numbers with 32 bits


def refuse(q: Tensor, k: Tensor | None = None, count: int = 0) -> None:
    """Name what these kernels cannot run; `count`: blocks selected by each token and head of k."""
    if q.dtype == torch.float64:
        raise KernelArgumentError("q.dtype", "float64", "float16, bfloat16 or float32 (or backend='torch')")
    if q.shape[3] > 256:
        raise KernelArgumentError("q.shape[3]", q.shape[3], "at most 256 (or backend='torch')")
    if q.shape[0] > MOST_ROWS:
        raise KernelArgumentError("q.shape[0]", q.shape[0], f"at most {MOST_ROWS} (or backend='torch')")
    entries = 0 if k is None else q.shape[0] * q.shape[1] * k.shape[2] * count
    if entries >= MOST_SELECTED:
        raise KernelArgumentError("spec.block_count", f"{count}, a selection of {entries} blocks", "fewer than 2^31")


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _padded(x: Tensor) -> Tensor:
    """Contiguous, the head dimension padded with zeros to a power of two from 16 (zeros change no score and no
    output)."""
    width = max(16, triton.next_power_of_2(x.shape[3]))
    return (x if width == x.shape[3] else F.pad(x, (0, width - x.shape[3]))).contiguous()


def _cut(x: Tensor, dim: int) -> Tensor:
    return x if x.shape[3] == dim else x[..., :dim]


def _vendor_takes(q: Tensor, doc_starts, query_index) -> bool:
    """Never in a deterministic mode: with `warn_only` PyTorch keeps flash attention's unordered sums, and ours cost no more."""
    return (
        q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[3] in VENDOR_TOKENS and q.shape[0] * q.shape[1] >= VENDOR_TOKENS[q.shape[3]]
        and doc_starts is None and query_index is None and not torch.are_deterministic_algorithms_enabled()
    )  # fmt: skip


def _vendor_layout(x: Tensor) -> Tensor:
    """x, or a contiguous copy: the vendor's kernels read a head's values as vectors of 16 bytes, and check little."""
    steps = (step for size, step in zip(x.shape[:-1], x.stride(), strict=False) if size > 1)
    aligned = x.data_ptr() % 16 == 0 and all(step * x.element_size() % 16 == 0 for step in steps)
    return x if aligned and x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _vendor(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
        heads_first = (_vendor_layout(x).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(
            *heads_first, is_causal=True, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
        )
    return out.transpose(1, 2)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, scale: float, dense: Dense):
        config = choose(q)
        o, lse = triton_dense.forward(q, k, v, scale, dense, config)
        ctx.save_for_backward(q, k, v, o, lse, *unchanged(dense.doc_starts, dense.query_index))
        ctx.scale, ctx.dense, ctx.config = scale, dense, config
        return o

    @staticmethod
    @first_order
    def backward(ctx, do):
        q, k, v, o, lse, *_ = ctx.saved_tensors
        grads = triton_dense_backward.backward(q, k, v, o, lse, do.contiguous(), ctx.scale, ctx.dense, ctx.config)
        return *grads, None, None


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, blocks, size: int, scale: float, doc_starts, query_index):
        config = choose(q)
        o, lse = triton_sparse.forward(q, k, v, blocks, size, scale, doc_starts, query_index, config)
        ctx.save_for_backward(q, k, v, blocks, o, lse, *unchanged(doc_starts, query_index))
        ctx.rest = size, scale, doc_starts, query_index, config
        return o

    @staticmethod
    @first_order
    def backward(ctx, do):
        q, k, v, blocks, o, lse, *_ = ctx.saved_tensors
        do = do.contiguous()
        delta = triton_gate.row_delta(o, do, ctx.rest[-1].gate_rows)
        return *triton_sparse.backward(q, k, v, blocks, lse, do, delta, *ctx.rest), None, None, None, None, None


class _SSA(torch.autograd.Function):
    """Both streams, gate and loss in one node, so that the two backwards add into the same gradients.

    The vendor's dense attention keeps its own little graph between forward and backward.
    """

    @staticmethod
    def forward(ctx, q, k, v, gate, blocks, size: int, scale: float, trunk: str, count: int, doc_starts, query_index):
        config = choose(q)
        ctx.graph = None
        if _vendor_takes(q, doc_starts, query_index):
            full, lse_full = _with_graph(ctx, q, k, v, scale).contiguous(), None
        else:
            ctx.dense = Dense(k.shape[1], doc_starts=doc_starts, query_index=query_index)
            full, lse_full = triton_dense.forward(q, k, v, scale, ctx.dense, config)
        sparse, lse = triton_sparse.forward(q, k, v, blocks, size, scale, doc_starts, query_index, config)
        out, loss = triton_gate.gate_forward(full, sparse, gate, trunk, count, config.gate_rows)
        saved = unchanged(doc_starts, query_index)
        ctx.save_for_backward(q, k, v, gate, blocks, full, sparse, lse_full, lse, *saved)
        ctx.rest = size, scale, doc_starts, query_index, config
        ctx.trunk, ctx.count, ctx.scale = trunk, count, scale
        return out, loss

    @staticmethod
    @first_order
    def backward(ctx, d_out, d_loss):
        q, k, v, gate, blocks, full, sparse, lse_full, lse, *_ = ctx.saved_tensors
        config = ctx.rest[-1]
        do_full, do_sparse, delta_full, delta_sparse, d_gate = triton_gate.gate_backward(
            full, sparse, gate, d_out.contiguous(), d_loss, ctx.trunk, ctx.count, config.gate_rows
        )
        if ctx.graph is not None:
            inputs, output = ctx.graph
            grads = torch.autograd.grad(output, inputs, do_full, retain_graph=True)
            grads = tuple(g.contiguous() for g in grads)
        else:
            grads = triton_dense_backward.backward(
                q, k, v, full, lse_full, do_full, ctx.scale, ctx.dense, config, delta=delta_full
            )
        del do_full
        grads = triton_sparse.backward(q, k, v, blocks, lse, do_sparse, delta_sparse, *ctx.rest, add_to=grads)
        return *grads, d_gate, None, None, None, None, None, None, None


class _Dual(torch.autograd.Function):
    """The same as _SSA, both streams from one pass over key tiles (chosen by `triton_config.dual`)."""

    @staticmethod
    def forward(ctx, q, k, v, gate, blocks, size: int, scale: float, trunk: str, count: int, doc_starts):
        config = choose(q)
        bits, word = triton_dual.selection_bits(blocks, q.shape[1], size, doc_starts)
        full, lse_full, sparse, lse = triton_dual.forward(q, k, v, bits, word, size, scale, doc_starts, config)
        out, loss = triton_gate.gate_forward(full, sparse, gate, trunk, count, config.gate_rows)
        ctx.save_for_backward(q, k, v, gate, blocks, full, sparse, lse_full, lse, *unchanged(doc_starts))
        ctx.rest = size, scale, doc_starts
        ctx.config, ctx.trunk, ctx.count = config, trunk, count
        return out, loss

    @staticmethod
    @first_order
    def backward(ctx, d_out, d_loss):
        q, k, v, gate, blocks, full, sparse, lse_full, lse, *_ = ctx.saved_tensors
        do_full, do_sparse, delta_full, delta_sparse, d_gate = triton_gate.gate_backward(
            full, sparse, gate, d_out.contiguous(), d_loss, ctx.trunk, ctx.count, ctx.config.gate_rows
        )
        grads = triton_dual_backward.backward(
            q, k, v, blocks, *ctx.rest, do_full, do_sparse, lse_full, lse, delta_full, delta_sparse, ctx.config
        )
        return *grads, d_gate, None, None, None, None, None, None


def _with_graph(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The vendor's dense attention, its graph kept on ctx when a gradient will be asked for."""
    if not any(ctx.needs_input_grad):
        return _vendor(q, k, v, scale)
    with torch.enable_grad():
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        output = _vendor(*inputs, scale)
    ctx.graph = inputs, output
    return output.detach()


def select_blocks(q, k, spec: BlockSpec, scale: float, doc_starts, query_index) -> Tensor:
    """A budget that covers the sequence needs no routing."""
    refuse(q, k, spec.block_count)
    doc_starts, query_index = _flat(doc_starts), _flat(query_index)
    with torch.no_grad():
        if spec.block_count >= slot_count(k.shape[1], spec.block_size) and spec.topk == "exact":
            return _every_block(q, k, spec, doc_starts, query_index)
        q, k = _padded(q), _padded(k)
        return triton_routing.select_blocks(q, k, spec, scale, doc_starts, query_index, choose(q))


def _every_block(q, k, spec: BlockSpec, doc_starts, query_index) -> Tensor:
    """The selection when the budget covers the sequence: own block, then every earlier one."""
    t = torch.arange(k.shape[1], device=q.device, dtype=torch.int32) if query_index is None else query_index
    start = torch.zeros_like(t)[None] if doc_starts is None else doc_starts[:, t.long()]
    own = ((t - start) // spec.block_size)[..., None]
    earlier = torch.arange(spec.block_count - 1, device=q.device, dtype=torch.int32)
    blocks = torch.cat([own, torch.where(earlier < own, earlier, -1)], -1)
    return blocks[:, :, None].expand(q.shape[0], -1, k.shape[2], -1).to(torch.int32).contiguous()


def full_attention(q, k, v, scale: float, doc_starts, query_index) -> Tensor:
    refuse(q)
    doc_starts, query_index = _flat(doc_starts), _flat(query_index)
    if _vendor_takes(q, doc_starts, query_index):
        return _vendor(q, k, v, scale)
    dense = Dense(k.shape[1], doc_starts=doc_starts, query_index=query_index)
    return _cut(_Dense.apply(_padded(q), _padded(k), _padded(v), scale, dense), q.shape[3])


def sparse_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts, query_index, blocks) -> Tensor:
    refuse(q, k, spec.block_count if blocks is None else blocks.shape[3])
    doc_starts, query_index = _flat(doc_starts), _flat(query_index)
    if blocks is None:
        blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    padded = (_padded(x) for x in (q, k, v))
    out = _Sparse.apply(*padded, blocks.contiguous(), spec.block_size, scale, doc_starts, query_index)
    return _cut(out, q.shape[3])


def ssa_attention(q, k, v, gate, spec: BlockSpec, trunk: str, scale: float, doc_starts, query_index, blocks):
    refuse(q, k, spec.block_count if blocks is None else blocks.shape[3])
    doc_starts, query_index = _flat(doc_starts), _flat(query_index)
    if blocks is None:
        blocks = select_blocks(q, k, spec, scale, doc_starts, query_index)
    padded = [_padded(x) for x in (q, k, v)]
    rest = gate.contiguous(), blocks.contiguous(), spec.block_size, scale, trunk, q.numel(), doc_starts
    if dual(*padded[:2], spec.block_size, blocks.shape[3], doc_starts, query_index):
        out, loss = _Dual.apply(*padded, *rest)
    else:
        out, loss = _SSA.apply(*padded, *rest, query_index)
    return _cut(out, q.shape[3]), loss


def window_attention(q, k, v, window: int, scale: float, doc_starts, query_index) -> Tensor:
    refuse(q)
    doc_starts, query_index = _flat(doc_starts), _flat(query_index)
    window = min(window, k.shape[1])  # kernels add it to positions of 32 bits
    dense = Dense(k.shape[1], window=window, doc_starts=doc_starts, query_index=query_index)
    return _cut(_Dense.apply(_padded(q), _padded(k), _padded(v), scale, dense), q.shape[3])


def compressed_attention(q, k, v, spec: BlockSpec, scale: float, doc_starts, query_index) -> Tensor:
    """Autograd carries the pooling (a mean over b tokens); attention over pooled keys is one more dense stream."""
    refuse(q)
    doc_starts, query_index = _flat(doc_starts), _flat(query_index)
    size, n = spec.block_size, k.shape[1]
    start = slot_starts(doc_starts, n, size, q.device).to(torch.int32).expand(q.shape[0], -1).contiguous()
    kbar, vbar = (_padded(pooled_blocks(x, doc_starts, size)) for x in (k, v))
    dense = Dense(n, pooled=size, key_start=start, doc_starts=doc_starts, query_index=query_index)
    return _cut(_Dense.apply(_padded(q), kbar, vbar, scale, dense), q.shape[3])
