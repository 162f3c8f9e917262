"""The public functions: check the arguments, settle the defaults, hand over to a backend.

Layout everywhere: q `[B, Nq, Hq, D]`, k and v `[B, N, Hkv, D]`, `Hq % Hkv == 0`; all are differentiable in q, k, v (and
gate), selection never is. A wrong argument is refused with a `KernelArgumentError` that names it, without
synchronising a GPU: the values of `doc_starts`, `query_index` and `blocks` are checked on CPU tensors only.

Shared arguments:
    scale: softmax scale; default D ** -0.5.
    doc_starts: int32 [B, N], for each token of the key sequence the index at which its own document begins.
        Attention never crosses a document boundary, and blocks are numbered from the document's start.
        Padding: one document of length 1 per token.
    query_index: int32 [Nq], the place of each query row in the key sequence (context parallelism); default 0..N-1.
    backend: "auto", "torch" or "triton". `auto` is Triton on CUDA (where dense attention without documents runs the
        vendor's kernel through SDPA) and PyTorch elsewhere, never a silent fall-back: what the Triton backend cannot
        run on CUDA (fp64, head dimensions above 256) is refused by name and needs "torch". "triton" on a CPU needs
        Triton's interpreter (TRITON_INTERPRET=1).
"""

import torch
from torch import Tensor

from ssa_kernels import checks
from ssa_kernels.autograd import plain
from ssa_kernels.layout import slot_count
from ssa_kernels.reference import torch_backend
from ssa_kernels.spec import AttentionStatistics, BlockSpec

try:
    import triton
except ImportError:  # a machine without triton has the PyTorch backend
    triton = None

WRONG_INTERPRETED = (torch.bfloat16,)  # Triton's interpreter gives any product of these, without an error


def _streams(backend: str):
    if backend == "torch":
        return torch_backend
    from ssa_kernels.triton import backend as triton_backend

    return triton_backend


def choose_backend(name: str, q: Tensor) -> str:
    checks.need(name in ("auto", "torch", "triton"), "backend", repr(name), "'auto', 'torch' or 'triton'")
    if name == "auto":
        return "triton" if q.is_cuda else "torch"
    if name == "triton":
        interpreted = triton is not None and triton.knobs.runtime.interpret
        checks.need(triton is not None, "backend", "'triton'", "'auto' or 'torch': triton is not installed")
        got = f"'triton' for tensors on {q.device}"
        checks.need(q.is_cuda or interpreted, "backend", got, "CUDA tensors, or 'auto' or 'torch'")
        wrong = interpreted and q.dtype in WRONG_INTERPRETED
        checks.need(not wrong, "q.dtype", q.dtype, "float16 or float32: Triton's interpreter multiplies it wrongly")
    return name


def _common(q, k, v, scale, doc_starts, query_index, backend) -> tuple[float, str]:
    checks.check_qkv(q, k, v)
    checks.check_query_index(query_index, q, k)
    checks.check_doc_starts(doc_starts, k)
    return checks.check_scale(scale, q), choose_backend(backend, q)


FEW = 64  # places of a selection


def _reachable(spec: BlockSpec, k: Tensor) -> BlockSpec:
    """spec with no more places than a row has blocks: what is attended to is the same, and lists stay short.

    Up to FEW places they are short anyway, and kernels are compiled for their number.
    """
    if spec.topk != "exact":
        return spec
    return spec._replace(block_count=min(spec.block_count, max(FEW, slot_count(k.shape[1], spec.block_size))))


def select_blocks(
    q: Tensor,
    k: Tensor,
    spec: BlockSpec,
    *,
    scale: float | None = None,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Routing: the blocks each token and KV group may attend to (arXiv 2511.20102, section 3).

    The score of a block is the sum, over the group's heads, of the softmax over pooled keys of the blocks complete
    at the token; the own block is always chosen, the rest are the best of the blocks strictly before it, ties to the
    lower number.

    Returns: int32 [B, Nq, Hkv, block_count], block numbers counted from the token's document: own block first, the
        others in ascending order, then -1.
    Raises: KernelArgumentError.
    """
    scale, backend = _common(q, k, None, scale, doc_starts, query_index, backend)
    checks.check_spec(spec)
    with plain(q):
        return _streams(backend).select_blocks(q, k, spec, scale, doc_starts, query_index)


def full_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal softmax attention inside each document. Returns [B, Nq, Hq, D] in q's dtype. Raises
    KernelArgumentError."""
    scale, backend = _common(q, k, v, scale, doc_starts, query_index, backend)
    with plain(q):
        return _streams(backend).full_attention(q, k, v, scale, doc_starts, query_index)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: BlockSpec,
    *,
    scale: float | None = None,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
    blocks: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention over the tokens, not after the query, of the selected blocks (arXiv 2511.20102, section 3).

    blocks: int32 [B, Nq, Hkv, any] as `select_blocks` returns; routed here when None. A row of -1 alone gives zeros.
    Returns: [B, Nq, Hq, D] in q's dtype.
    Raises: KernelArgumentError.
    """
    scale, backend = _common(q, k, v, scale, doc_starts, query_index, backend)
    checks.check_spec(spec)
    if blocks is not None:
        checks.check_blocks(blocks, q, k, spec.block_size)
    with plain(q):
        spec = _reachable(spec, k)
        return _streams(backend).sparse_attention(q, k, v, spec, scale, doc_starts, query_index, blocks)


def ssa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    spec: BlockSpec,
    *,
    trunk: str,
    scale: float | None = None,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
    blocks: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Both streams, gated, and their alignment loss (arXiv 2511.20102, section 3).

    gate: [B, Nq, Hq] in (0, 1), any floating type; multiplies both streams.
    trunk: "full" or "sparse", the stream that is returned.
    blocks: int32 [B, Nq, Hkv, any] as `select_blocks` returns; routed here when None. Give them when q holds only some
        of the heads that share a selection.
    Returns: gated trunk output [B, Nq, Hq, D] in q's dtype, and the alignment loss
        SmoothL1(F, sg(S)) + SmoothL1(sg(F), S) with F, S the gated streams: fp32 scalar (fp64 for fp64 inputs), mean
        over all B*Nq*Hq*D elements of this call. It sends gradients to both streams whatever the trunk.
    Raises: KernelArgumentError.
    """
    scale, backend = _common(q, k, v, scale, doc_starts, query_index, backend)
    checks.check_spec(spec)
    checks.check_gate(gate, q)
    checks.need(trunk in ("full", "sparse"), "trunk", repr(trunk), "'full' or 'sparse'")
    if blocks is not None:
        checks.check_blocks(blocks, q, k, spec.block_size)
    with plain(q):
        spec = _reachable(spec, k)
        return _streams(backend).ssa_attention(q, k, v, gate, spec, trunk, scale, doc_starts, query_index, blocks)


def compressed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: BlockSpec,
    *,
    scale: float | None = None,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """nsa's compressed stream: softmax attention over block means of k and v, blocks complete at the token only.

    Returns: [B, Nq, Hq, D] in q's dtype; zero for tokens with no complete block. Only `spec.block_size` matters.
    Raises: KernelArgumentError.
    """
    scale, backend = _common(q, k, v, scale, doc_starts, query_index, backend)
    checks.check_spec(spec)
    with plain(q):
        return _streams(backend).compressed_attention(q, k, v, spec, scale, doc_starts, query_index)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    scale: float | None = None,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """nsa's sliding window: causal attention over the last `window` tokens of the document, own included.

    Returns: [B, Nq, Hq, D] in q's dtype. Raises KernelArgumentError.
    """
    scale, backend = _common(q, k, v, scale, doc_starts, query_index, backend)
    checks.need(checks.whole(window, 1), "window", window, "an integer of at least 1 (tokens)")
    with plain(q):
        return _streams(backend).window_attention(q, k, v, window, scale, doc_starts, query_index)


def attention_statistics(
    q: Tensor,
    k: Tensor,
    spec: BlockSpec,
    *,
    scale: float | None = None,
    doc_starts: Tensor | None = None,
    query_index: Tensor | None = None,
    backend: str = "auto",
) -> AttentionStatistics:
    """Sparsity and entropy of the full attention per head (arXiv 2511.20102, section 5); no gradient.

    Returns: AttentionStatistics(sparsity fp32 [Hq], entropy fp32 [Hq] in nats), means over all tokens of the call.
    Raises: KernelArgumentError.
    """
    scale, _ = _common(q, k, None, scale, doc_starts, query_index, backend)
    checks.check_spec(spec)
    with plain(q):
        spec = _reachable(spec, k)
        return torch_backend.attention_statistics(q, k, spec, scale, doc_starts, query_index)
