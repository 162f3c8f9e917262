"""Checks of this machine's GPUs: driver, clocks, errors, links, memory, and how fast they really are.

Figures are compared with `planning/hardware.py` where it has the device, so that `ssa plan` and the doctor expect the same.
"""

import csv
import os
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

from ssa_megatron.doctor.device_speed import Speed, measure
from ssa_megatron.doctor.finding import Finding
from ssa_megatron.planning.hardware import TABLE, Hardware

FIELDS = (
    "name,driver_version,clocks.sm,clocks.max.sm,clocks_throttle_reasons.active,temperature.gpu,power.draw,power.limit,"
    "ecc.errors.uncorrected.volatile.total,ecc.errors.corrected.volatile.total,pcie.link.gen.current,pcie.link.gen.max,"
    "pcie.link.width.current,pcie.link.width.max,mig.mode.current"
)
SLOWDOWN = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
# shares of the expected figure; H100s of one kind differ by a few percent
WARN, FAIL = 0.9, 0.75


def gpus(only: int | None = None) -> tuple[list[Finding], dict[int, Speed]]:
    """Findings on every GPU, or on one, and what each reached."""
    import torch

    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
            remedy = "nvidia-smi shows whether the driver works; `python -c 'import torch; print(torch.version.cuda)'` the build"
            return [Finding("GPU", "FAIL", "there is one, and torch cannot use it", remedy)], {}
        return [Finding("GPU", "OK", "none: training runs on the CPU")], {}
    findings: list[Finding] = []
    speeds: dict[int, Speed] = {}
    count = torch.cuda.device_count()
    for index in range(count) if only is None else (only,):
        device = torch.device("cuda", index)
        free, total = torch.cuda.mem_get_info(device)
        speed = speeds[index] = measure(device, partial(_ask, index))
        found = speed.meanwhile or {}
        name = torch.cuda.get_device_name(device)
        label = f"GPU {index}"
        driver = f", driver {found['driver_version']}" if found else ""
        findings.append(Finding(label, "OK", f"{name}, {total / 2**30:.1f} GiB{driver}, CUDA {torch.version.cuda}"))
        findings += _memory(label, index, free, total)
        findings += _health(label, found)
        findings += rates(label, speed, expected(name))
        torch.cuda.empty_cache()
    findings += _links(count)
    return findings, speeds


def expected(name: str) -> Hardware | None:
    """The table's row of a device, by the name the driver gives it."""
    return next((row for key, row in TABLE.items() if key in name.lower()), None)


def rates(label: str, speed: Speed, row: Hardware | None) -> list[Finding]:
    """The measured figures, against the table's where there is one."""
    findings = []
    for what, value, unit, scale, aim in (
        ("matmul", speed.matmul, "TFLOP/s in bf16", 1e12, row.matmul if row else None),
        ("copy", speed.copy, "GB/s", 1e9, row.bandwidth if row else None),
    ):
        found = f"{what} {value / scale:,.0f} {unit}"
        if row is None or aim is None:
            findings.append(Finding(label, "OK", f"{found}; nothing to compare it with"))
            continue
        share = value / aim
        found += f", {share:.0%} of the {aim / scale:,.0f} expected of an {row.name}"
        level = "FAIL" if share < FAIL else "WARN" if share < WARN else "OK"
        remedy = "" if level == "OK" else "see clocks, temperature and other processes above; else drain the node"
        findings.append(Finding(label, level, found, remedy))
    return findings


def _ask(index: int) -> dict[str, str]:
    """What nvidia-smi says of a GPU; empty where there is no nvidia-smi."""
    said = _smi(f"--id={_handle(index)}", f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits")
    rows = list(csv.reader(said.splitlines(), skipinitialspace=True))
    names = FIELDS.split(",")
    return dict(zip(names, rows[0], strict=True)) if rows and len(rows[0]) == len(names) else {}


def _handle(index: int) -> str:
    """nvidia-smi's name for torch's GPU `index`, which CUDA_VISIBLE_DEVICES may have renumbered."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[index].strip() if visible else str(index)


def _smi(*arguments: str) -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout if done.returncode == 0 else ""


def _memory(label: str, index: int, free: int, total: int) -> list[Finding]:
    if free > 0.95 * total:
        return []
    users = _smi(f"--id={_handle(index)}", "--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader")
    who = "; ".join(users.split("\n")[:4]).strip("; ") or "unknown: nvidia-smi lists none"
    found = f"{(total - free) / 2**30:.1f} GiB are in use already: {who}"
    return [Finding(label, "WARN" if free > 0.5 * total else "FAIL", found, "end those processes, if they are yours")]


def _health(label: str, found: dict[str, str]) -> list[Finding]:
    """Clocks and throttling under load, ECC errors, PCIe, MIG."""
    if not found:
        return [
            Finding(label, "WARN", "nvidia-smi does not answer: no clocks, errors or links", "install nvidia-utils")
        ]
    findings = []
    now, most = found["clocks.sm"], found["clocks.max.sm"]
    reasons = (
        int(found["clocks_throttle_reasons.active"], 16)
        if found["clocks_throttle_reasons.active"].startswith("0x")
        else 0
    )
    slowed = [text for bit, text in SLOWDOWN.items() if reasons & bit]
    text = f"{now} of {most} MHz under load, {found['temperature.gpu']} C, {found['power.draw']} of {found['power.limit']} W"
    if slowed:
        findings.append(
            Finding(label, "FAIL", f"{text}: {', '.join(slowed)}", "cooling or power of this node: drain it")
        )
    else:
        findings.append(Finding(label, "OK", text))
    uncorrected, corrected = (found[f"ecc.errors.{kind}.volatile.total"] for kind in ("uncorrected", "corrected"))
    if uncorrected.isdecimal():
        if int(uncorrected):
            findings.append(
                Finding(
                    label,
                    "FAIL",
                    f"{uncorrected} uncorrected ECC errors since the driver was loaded",
                    "reset or replace it",
                )
            )
        elif int(corrected) > 1000:
            findings.append(
                Finding(
                    label, "WARN", f"{corrected} corrected ECC errors since the driver was loaded", "watch this GPU"
                )
            )
        else:
            findings.append(
                Finding(label, "OK", f"ECC errors since the driver was loaded: 0 uncorrected, {corrected} corrected")
            )
    width, widest = found["pcie.link.width.current"], found["pcie.link.width.max"]
    if width.isdecimal() and widest.isdecimal() and int(width) < int(widest):
        findings.append(Finding(label, "WARN", f"PCIe x{width} of x{widest}", "reseat the card, or drain the node"))
    if found["mig.mode.current"] == "Enabled":
        findings.append(
            Finding(label, "WARN", "MIG is on: a slice, not the GPU", "ask for whole GPUs, or plan for the slice")
        )
    return findings


def _links(count: int) -> list[Finding]:
    """NVLink, where there is more than one GPU to link."""
    if count < 2:
        return []
    said = _smi("nvlink", "--status")
    up, down = len(re.findall(r"Link \d+: [\d.]+ GB/s", said)), len(re.findall(r"Link \d+: <?inactive", said, re.I))
    if not up:
        remedy = "fine for a node without NVLink; keep tensor parallelism at 1 there. Else: systemctl status nvidia-fabricmanager"
        return [Finding("NVLink", "WARN", f"none of {count} GPUs has a link up", remedy)]
    if down:
        return [
            Finding(
                "NVLink",
                "FAIL",
                f"{down} link(s) down, {up} up",
                "systemctl status nvidia-fabricmanager; drain the node",
            )
        ]
    return [Finding("NVLink", "OK", f"{up} links up on {count} GPUs")]
