"""The figures a time estimate stands on, each with where it comes from: measured here, or assumed until somebody measures.

All rates are per GPU. `assumed` names the fields nobody measured on this code; the page says so beside every estimate.
"""

from dataclasses import dataclass

from ssa_megatron.errors import ConfigError


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU in one kind of cluster."""

    name: str
    memory: int
    """Bytes a process can use, as torch.cuda.mem_get_info says."""
    outside: int
    """Bytes in use outside the allocator: CUDA context, NCCL, compiled kernels."""
    peak_flops: float
    """bf16 without sparsity, the maker's figure; what MFU is a share of."""
    matmul: float
    """FLOP/s that linear layers of training shapes reach."""
    bandwidth: float
    """Bytes/s that element-wise kernels reach."""
    dense: tuple[tuple[int, float], ...]
    """(head width, FLOP/s) of causal attention in the vendor's kernel, forward and backward."""
    own: float
    """Rate of our dense kernel, which takes documents and context parallelism, as a share of the vendor's."""
    select: float
    """Seconds per token, key/value head and selected key channel (block_size * block_count * head_dim), both passes."""
    pick: float
    """Seconds per token and key/value head: choosing its blocks."""
    stream: tuple[tuple[int, float], ...]
    """(head width, seconds per token and query channel) of the sparse stream, both passes."""
    gate: float
    """Seconds per token and query channel: gate and alignment loss, both passes."""
    route: float
    """Seconds per token, query head and token of context: routing."""
    one_pass: float
    """Both streams in one pass, as a multiple of our dense kernel's time."""
    gather: float
    """Seconds per token, query head and selected key channel, which remain to be gathered beside that pass."""
    node: int = 8
    """GPUs that share the fast links."""
    link: float = 350e9
    """Bytes/s a GPU sends within a node, in large collectives."""
    network: float = 40e9
    """Bytes/s a GPU sends between nodes."""
    host: float = 25e9
    """Bytes/s of host memory that one rank's offloaded update reaches, beside the other ranks of its node."""
    host_link: float = 25e9
    """Bytes/s between a GPU and its host."""
    assumed: tuple[str, ...] = ("link", "network", "node", "host", "host_link")

    def dense_flops(self, head_dim: int) -> float:
        """FLOP/s of the vendor's kernel at the measured head width next to `head_dim`."""
        return _nearest(self.dense, head_dim)

    def stream_seconds(self, head_dim: int) -> float:
        """Seconds per token and query channel of the sparse stream, at the measured head width next to `head_dim`."""
        return _nearest(self.stream, head_dim)


def _nearest(rows: tuple[tuple[int, float], ...], head_dim: int) -> float:
    return min(rows, key=lambda row: abs(row[0] - head_dim))[1]


# Attention: fitted to kernels/benchmarks/results/attention-h100-2026-11-24.csv (86a8313, one H100 80GB HBM3, torch 2.11,
# Triton 3.6) and held to the newer rows of docs/performance.md, "Attention kernels", by
# test_planning_measured.py. The rest: training runs of measured-h100.jsonl.
_H100 = Hardware(
    name="h100",
    memory=int(79.1 * 2**30),
    outside=int(1.5 * 2**30),
    peak_flops=989e12,
    matmul=620e12,
    bandwidth=2.4e12,
    dense=((64, 410e12), (128, 545e12)),
    own=0.9,
    select=1.26e-12,
    pick=4.0e-9,
    stream=((64, 1.53e-11), (128, 3.4e-11)),
    gate=5.5e-12,
    route=4.2e-14,
    one_pass=1.36,
    gather=1.28e-13,
)

TABLE = {gpu.name: gpu for gpu in (_H100,)}


def find(name: str) -> Hardware:
    """The table's entry. Raises ConfigError with the names there are."""
    if name not in TABLE:
        raise ConfigError(
            f"--gpu {name}: not in the table of hardware figures", remedy=f"one of {', '.join(TABLE)}", id="unknown-gpu"
        )
    return TABLE[name]
