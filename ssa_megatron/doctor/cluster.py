"""`ssa doctor --cluster`, on every rank under torchrun or srun: do the machines find each other, and is one of them slow.

One rank a machine looks at the machine, every rank at its device, and together they measure the store, the clocks and an
all-reduce. All ranks get all findings; a group that does not come together is a FAIL that says who was waited for.
"""

import datetime
import os
import socket
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ssa_megatron.doctor.device_speed import measure
from ssa_megatron.doctor.doctor_command import examine_machine
from ssa_megatron.doctor.finding import Finding
from ssa_megatron.doctor.gpu import expected, gpus
from ssa_megatron.parallel.device import backend as backend_here
from ssa_megatron.parallel.device import current, on_gpu
from ssa_megatron.planning.hardware import Hardware

SLOW, LAME = 0.9, 0.7  # of the median rank: WARN, FAIL
PATIENCE = datetime.timedelta(minutes=10)  # one rank a machine imports every library while the others wait
CLOCKS = 2.0  # seconds by which clocks of machines may differ


def examine(disk: Path, need_gib: float, timeout: float) -> tuple[list[Finding], bool]:
    """All findings, on every rank, and whether this rank is the one that prints them."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    began = time.monotonic()
    try:
        store = _meet(rank, world, timeout)
        # gloo: it needs nothing but the network; NCCL is tried below, where its failure can be told
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    except (dist.DistError, RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0][:300]
        remedy = f"is every node started, does {address} resolve and answer from each (ssa doctor --host), is a firewall between?"
        found = f"{world} processes did not meet at {address} within {timeout:.0f} s: {reason}"
        return [Finding("rendezvous", "FAIL", found, remedy, socket.gethostname())], True
    findings = [Finding("rendezvous", "OK", f"{world} processes met at {address} in {time.monotonic() - began:.1f} s")]
    hosts = _gather(socket.gethostname())
    findings += _together(disk, need_gib, hosts)
    findings += _store(store, rank)
    findings += _clocks(hosts)
    findings += _all_reduce(world, len(set(hosts)))
    dist.destroy_process_group()
    return findings, rank == 0


def _meet(rank: int, world: int, timeout: float) -> dist.Store:
    """The store, when every rank has signed in. Raises RuntimeError naming those that have not."""
    limit = datetime.timedelta(seconds=timeout)
    # under torchrun the agent serves the store; else the first rank does
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    server = dist.TCPStore(*address, world, serves, timeout=limit, wait_for_workers=False)
    store = dist.PrefixStore(f"doctor-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", server)
    store.set(f"here/{rank}", socket.gethostname())
    keys = [f"here/{other}" for other in range(world)]
    try:
        store.wait(keys, limit)
    except dist.DistStoreError:
        absent = [str(other) for other, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(f"no sign of rank(s) {', '.join(absent[:20])}") from None
    return store


def _gather(value) -> list:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _together(disk: Path, need_gib: float, hosts: list[str]) -> list[Finding]:
    """Each machine's findings under its name, and ranks that are slower than the others."""
    rank, host = dist.get_rank(), socket.gethostname()
    first = hosts.index(host) == rank
    own, speed = [], None
    if first:
        own += examine_machine(disk, need_gib, None, sorted(set(hosts)), devices=False)
    dist.barrier()  # the speed of all ranks at once: as in training, and with the same neighbours
    if on_gpu():
        index = current().index
        try:
            found, speeds = gpus(index)
            own, speed = own + found, speeds[index]
        except RuntimeError as error:  # a GPU that does not answer; the others still say what they found
            remedy = "nvidia-smi and dmesg (Xid) say what it died of: drain the node"
            own.append(Finding(f"GPU {index}", "FAIL", str(error).splitlines()[0][:300], remedy))
    else:
        speed = measure(torch.device("cpu"))
        own.append(
            Finding("device", "OK", f"CPU: matmul {speed.matmul / 1e9:.0f} GFLOP/s, copy {speed.copy / 1e9:.1f} GB/s")
        )
    gathered = _gather((host, own, speed and (speed.matmul, speed.copy)))
    named = [Finding(f.check, f.level, f.found, f.remedy, name) for name, found, _ in gathered for f in found]
    return named + outliers([(rank, name, figures) for rank, (name, _, figures) in enumerate(gathered) if figures])


def outliers(figures: list[tuple[int, str, tuple[float, float]]]) -> list[Finding]:
    """Ranks (rank, host, (matmul, copy)) that are slower than the median of all: a synchronous job runs at their speed."""
    findings = []
    for position, what in enumerate(("matmul", "copy")):
        median = statistics.median(values[position] for _, _, values in figures)
        shares = [(values[position] / median, rank, host) for rank, host, values in figures]
        for share, rank, host in sorted(shares):
            if share < SLOW:
                found = f"rank {rank}: {what} at {share:.0%} of the median of {len(figures)} ranks"
                remedy = f"leave {host} out (sbatch --exclude={host}) and look at its clocks, temperature and other processes"
                findings.append(Finding("speed", "FAIL" if share < LAME else "WARN", found, remedy, host))
    spread = max(values[0] for _, _, values in figures) / min(values[0] for _, _, values in figures)
    return findings or [
        Finding("speed", "OK", f"{len(figures)} ranks alike: fastest and slowest matmul {spread:.2f} : 1")
    ]


def _store(store: dist.Store, rank: int) -> list[Finding]:
    """A value set and read back, which every rendezvous and agreement at start consists of."""
    times = []
    for number in range(50):
        began = time.perf_counter()
        store.set(f"trip/{rank}/{number}", "x")
        store.get(f"trip/{rank}/{number}")
        times.append(time.perf_counter() - began)
    medians = _gather(statistics.median(times) * 1e3)
    slowest = max(medians)
    found = f"set and get in {statistics.median(medians):.2f} ms, {slowest:.2f} ms from rank {medians.index(slowest)}"
    if slowest > 50:
        return [Finding("store", "WARN", found, "a slow or busy network, or a busy first node: starts will be slow")]
    return [Finding("store", "OK", found)]


def _clocks(hosts: list[str]) -> list[Finding]:
    dist.barrier()
    times = _gather(time.time())
    spread = max(times) - min(times)
    if spread > CLOCKS:
        late, early = hosts[times.index(min(times))], hosts[times.index(max(times))]
        return [Finding("clocks", "WARN", f"{late} is {spread:.1f} s behind {early}", "chronyc tracking, on both")]
    return [Finding("clocks", "OK", f"within {spread:.2f} s")]


def _all_reduce(world: int, nodes: int) -> list[Finding]:
    """Bus bandwidth, 2 (n - 1) / n bytes a byte reduced, over what training will use."""
    if world == 1:
        return []
    backend, device = backend_here(), current()
    if any(_gather(backend != "nccl")):
        backend, device = "gloo", torch.device("cpu")
    try:
        group = dist.new_group(backend=backend, timeout=datetime.timedelta(seconds=120))
        sizes = (2**16, 2**24 if device.type == "cpu" else 2**30)
        findings = [_reduce_once(group, backend, device, world, nodes, size) for size in sizes]
    except RuntimeError as error:
        remedy = "NCCL_DEBUG=INFO shows the interface it chose; NCCL_SOCKET_IFNAME and NCCL_IB_HCA set it"
        return [Finding("all-reduce", "FAIL", f"{backend}: {str(error).splitlines()[0][:300]}", remedy)]
    return findings


def _reduce_once(group, backend: str, device: torch.device, world: int, nodes: int, size: int) -> Finding:
    data, times = torch.ones(size // 4, device=device), []
    for _ in range(8):
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(data, group=group)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    seconds = max(_gather(statistics.median(times[3:])))
    speed = 2 * (world - 1) / world * size / seconds
    found = f"{backend}, {_bytes(size)} over {world} ranks on {nodes} node(s): {seconds * 1e3:.2f} ms, {speed / 1e9:.2f} GB/s"
    row: Hardware | None = expected(torch.cuda.get_device_name()) if device.type == "cuda" else None
    if row is None or size < 2**26:
        return Finding("all-reduce", "OK", found)
    aim = row.link if nodes == 1 else row.network
    found += f", {speed / aim:.0%} of what `ssa plan` assumes"
    if speed < 0.5 * aim:
        remedy = (
            "NCCL_DEBUG=INFO: does it use NVLink and InfiniBand? Else give ssa plan --link-gbytes or --network-gbytes"
        )
        return Finding("all-reduce", "WARN", found, remedy)
    return Finding("all-reduce", "OK", found)


def _bytes(size: int) -> str:
    return f"{size >> 10} KiB" if size < 2**20 else f"{size >> 20} MiB"
