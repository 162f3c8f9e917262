"""Checks of one machine that need no GPU: versions, libraries, disk, shared memory, port, names, limits. Imports no torch.

Each returns findings and changes nothing that stays. What is expensive to find out later is tried now: libraries are
imported, the disk is written to, the port is bound, names are resolved.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from ssa_megatron.doctor.finding import Finding

LIBRARIES = {
    "torch": "torch",
    "triton": "triton",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "megatron-core": "megatron.core",
    "deepspeed": "deepspeed",
    "mosaicml-streaming": "streaming",
    "sentencepiece": "sentencepiece",
    "pyarrow": "pyarrow",
    "transformers": "transformers",
    "safetensors": "safetensors",
    "pydantic": "pydantic",
    "PyYAML": "yaml",
    "typer": "typer",
    "tensorboard": "torch.utils.tensorboard",
    "psutil": "psutil",
}
"""What training imports: distribution -> module."""
ALSO_PROVEN = {"torch": ("2.11.",), "triton": ("3.6.",), "transformers": ("5.",)}  # a common GPU image, README
REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
PROBE = 64 * 2**20  # bytes written to try a disk
SHARED = Path("/dev/shm")
# What libraries name their segments: torch, multiprocessing, NCCL, mosaicml-streaming (its leftovers make the next job hang)
FAMILIES = re.compile(r"torch_\d+_|psm_|sem\.(mp|loky)-|nccl-|\d{6}_|gloo|__KMP")


def pins(requirements: Path = REQUIREMENTS) -> dict[str, str]:
    """Distribution -> required version, from a checkout's requirements.txt or else from the installed wheel; else empty."""
    try:
        text = (
            requirements.read_text() if requirements.is_file() else "\n".join(metadata.requires("ssa-megatron") or [])
        )
    except metadata.PackageNotFoundError:
        return {}
    found = re.findall(r"^([\w.-]+)(?:\[[\w,]*\])?==([^\s#;]+)", text, re.M)
    return {_normalized(name): version for name, version in found}


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()  # PEP 503: a wheel's metadata spells PyYAML pyyaml


def versions(requirements: Path = REQUIREMENTS) -> list[Finding]:
    """Installed versions against the required ones."""
    required = pins(requirements)
    if not required:
        remedy = "pip install the wheel, or run from a copy of the repository"
        found = f"no {requirements}, and ssa-megatron is not installed: versions were not compared"
        return [Finding("versions", "WARN", found, remedy)]
    missing, other, fitting = [], {}, 0
    for name in LIBRARIES:
        try:
            found = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found == required.get(_normalized(name)) or found.startswith(ALSO_PROVEN.get(name, "\n")):
            fitting += 1
        else:
            other[name] = f"{name} {found}, not {required.get(_normalized(name))}"
    findings = [
        Finding("versions", "OK", f"python {sys.version.split()[0]}; {fitting} of {len(LIBRARIES)} as required")
    ]
    if missing:
        findings.append(
            Finding("versions", "FAIL", "not installed: " + ", ".join(missing), _install(missing, required))
        )
    if other:
        findings.append(Finding("versions", "WARN", "; ".join(other.values()), _install(other, required)))
    return findings


def _install(names: Iterable[str], required: dict[str, str]) -> str:
    """The command that installs these distributions as required; one without a pin is installed as it comes."""
    pinned = [f"{name}=={required[key]}" if (key := _normalized(name)) in required else name for name in names]
    return f"{sys.executable} -m pip install {' '.join(pinned)}"


def libraries() -> list[Finding]:
    """Every library imported, in a process of its own: a missing shared object shows here, not in the first step."""
    code = """if 1:
        import importlib, json, sys, warnings
        warnings.simplefilter("ignore")
        for name in sys.argv[1:]:
            problem = None
            try:
                importlib.import_module(name)
            except BaseException as error:
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
            print("\\n" + json.dumps([name, problem]), flush=True)
    """
    began = time.monotonic()
    environment = {**os.environ, **({} if Path("/dev/nvidiactl").exists() else {"DS_ACCELERATOR": "cpu"})}
    command = [sys.executable, "-c", code, *LIBRARIES.values()]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        output, said = done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        output, said = (late.stdout or b"").decode(errors="replace"), "no answer within 300 s"
    found = dict(json.loads(line) for line in output.splitlines() if line.startswith("["))
    findings = []
    for distribution, module in LIBRARIES.items():
        if module not in found:  # the process died in it
            last = (said.strip().splitlines() or ["no message"])[-1]
            remedy = f"python -c 'import {module}' shows more; reinstall {distribution}"
            findings.append(Finding("libraries", "FAIL", f"import {module} ended the process: {last[:200]}", remedy))
            break
        if problem := found[module]:
            remedy = _install([distribution], pins())
            if "shared object" in problem:
                remedy = f"install the system library named above, or reinstall {distribution}"
            findings.append(Finding("libraries", "FAIL", f"import {module}: {problem[:200]}", remedy))
    seconds = time.monotonic() - began
    return findings or [Finding("libraries", "OK", f"{len(LIBRARIES)} import, in {seconds:.0f} s")]


def disk(path: Path, need_gib: float) -> list[Finding]:
    """Free space and inodes where `path` will be, and 64 MiB really written there: quotas show only so."""
    where = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    remedy = f"make room at {where}, or put runs elsewhere: --run-folder"
    name = f"disk {where}"
    free, nodes = shutil.disk_usage(where).free / 2**30, os.statvfs(where)
    findings = []
    if free < need_gib:
        findings.append(Finding(name, "FAIL", f"{free:.1f} GiB free, {need_gib:g} wanted (--need-gib)", remedy))
    if nodes.f_files and nodes.f_favail < 10_000:
        findings.append(Finding(name, "FAIL", f"{nodes.f_favail} inodes free", remedy))
    block, began = os.urandom(2**22), time.monotonic()
    try:
        with tempfile.NamedTemporaryFile(dir=where, prefix=".ssa-doctor-") as file:
            for _ in range(PROBE // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.monotonic() - began
    except OSError as error:
        findings.append(Finding(name, "FAIL", f"64 MiB could not be written: {error.strerror}", remedy))
    else:
        speed = PROBE / seconds / 1e6
        found = f"{free:.0f} GiB free; 64 MiB written and synced in {seconds:.2f} s, {speed:.0f} MB/s"
        slow = Finding(name, "WARN", found, "checkpoints will take long: use a faster file system, or save less often")
        findings.append(slow if speed < 20 else Finding(name, "OK", found))
    if shutil.which("quota"):
        said = subprocess.run(["quota", "-w"], capture_output=True, text=True, timeout=30, check=False)
        if said.returncode:
            findings.append(Finding("quota", "FAIL", said.stdout.strip()[-300:] or "over quota", remedy))
    return findings


def shared_memory() -> list[Finding]:
    """Room in /dev/shm, and segments of ours that dead processes left; those of living ones are not mentioned."""
    usage = shutil.disk_usage(SHARED)
    free = usage.free / 2**30
    findings = []
    if free < 1:
        remedy = "start the container with --shm-size=16g or --ipc=host, or remove what fills it"
        findings.append(Finding("shared memory", "WARN", f"{free:.2f} GiB free of {usage.total / 2**30:.2f}", remedy))
    if left := leftovers():
        size = sum(path.lstat().st_size for path in left)
        names = " ".join(str(path) for path in left[:20]) + (" ..." if len(left) > 20 else "")
        found = f"{len(left)} segment(s) of dead processes, {size / 2**20:.1f} MiB"
        findings.append(Finding("shared memory", "FAIL", found, f"rm {names}"))
    return findings or [Finding("shared memory", "OK", f"{free:.1f} GiB free, nothing left behind")]


def leftovers() -> list[Path]:
    """Segments in /dev/shm of this user and of families we know, a minute old, that no process has open or mapped."""
    candidates = {}
    for path in SHARED.iterdir() if SHARED.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):
            about = path.lstat()
            if FAMILIES.match(path.name) and about.st_uid == os.geteuid() and time.time() - about.st_mtime > 60:
                candidates[str(path)] = path
    if not candidates:
        return []
    used = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            used |= {
                line.split(None, 5)[5] for line in (process / "maps").read_text().splitlines() if "/dev/shm/" in line
            }
        with contextlib.suppress(OSError):
            for handle in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    used.add(os.readlink(handle))
    return [path for name, path in sorted(candidates.items()) if name not in used]


def port(number: int) -> list[Finding]:
    """Whether the rendezvous port can be bound here."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            remedy = (
                f"end that process, or another port: --rdzv-endpoint HOST:{number + 1} (torchrun), --port {number + 1}"
            )
            return [Finding("port", "FAIL", f"{number} cannot be bound: {error.strerror}{_owner(number)}", remedy)]
    return [Finding("port", "OK", f"{number} is free")]


def _owner(number: int) -> str:
    import psutil

    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if (
                connection.laddr
                and connection.laddr.port == number
                and connection.status == "LISTEN"
                and connection.pid
            ):
                return f"; process {connection.pid}, {psutil.Process(connection.pid).name()}, listens there"
    return ""


def names(hosts: Iterable[str]) -> list[Finding]:
    """Whether this machine can resolve each host name, itself included, and to what."""
    own = socket.gethostname()
    findings, addresses = [], []
    for host in dict.fromkeys((own, *hosts)):
        found, problem = _resolve(host)
        if problem:
            remedy = (
                f"mend DNS or /etc/hosts on {own}; or give addresses (MASTER_ADDR, --rdzv-endpoint) instead of names"
            )
            findings.append(Finding("names", "FAIL", f"{host} cannot be resolved: {problem}", remedy))
        elif host == own and all(address.startswith("127.") or address == "::1" for address in found):
            remedy = (
                f"in /etc/hosts give {own} its network address; or set MASTER_ADDR to it. One machine needs neither"
            )
            findings.append(Finding("names", "WARN", f"{own} is {', '.join(found)}: others cannot reach that", remedy))
        else:
            addresses.append(f"{host} {found[0]}")
    return findings + ([Finding("names", "OK", ", ".join(addresses))] if addresses else [])


def _resolve(host: str) -> tuple[list[str], str | None]:
    answer: list = [[], "no answer within 10 s"]

    def ask() -> None:
        try:
            answer[:] = [sorted({entry[4][0] for entry in socket.getaddrinfo(host, None)}), None]
        except (OSError, UnicodeError) as error:
            answer[1] = getattr(error, "strerror", None) or str(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(10)
    return answer[0], answer[1]


def limits() -> list[Finding]:
    """Open files, locked memory (InfiniBand registers it), cores and memory of this process."""
    import psutil

    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    findings = []
    if files != resource.RLIM_INFINITY and files < 4096:
        findings.append(Finding("limits", "WARN", f"{files} open files allowed", "ulimit -n 65536"))
    if Path("/sys/class/infiniband").is_dir() and locked != resource.RLIM_INFINITY:
        remedy = "ulimit -l unlimited (in the SLURM daemon's unit: LimitMEMLOCK=infinity)"
        findings.append(Finding("limits", "WARN", f"{locked >> 20} MiB of locked memory, with InfiniBand", remedy))
    memory = psutil.virtual_memory()
    cores = len(os.sched_getaffinity(0))
    found = f"{cores} cores for this process, {memory.available / 2**30:.0f} of {memory.total / 2**30:.0f} GiB free"
    return [*findings, Finding("limits", "OK", f"{found}, {files} open files")]
