"""`ssa doctor`: runs the checks, shows what they found, and says with the exit code whether anything FAILs.

Without --cluster it looks at this machine alone. A check that itself breaks is a FAIL that says so; the others still run.
"""

from collections.abc import Callable
from pathlib import Path

from ssa_megatron.doctor import machine, ranks
from ssa_megatron.doctor.finding import Finding, as_json, page, worst
from ssa_megatron.errors import EnvironmentProblem


def doctor(
    *, cluster: bool, disk: Path, need_gib: float, port: int, hosts: list[str], as_text: bool, timeout: float
) -> int:
    """Print the findings; the exit code: 0, or that of EnvironmentProblem when there is a FAIL. On every rank the same."""
    if cluster:
        ranks.find()
        from ssa_megatron.doctor.cluster import examine

        findings, is_rank0 = examine(disk, need_gib, timeout)
    else:
        findings, is_rank0 = examine_machine(disk, need_gib, port, hosts), True
    if is_rank0:
        print(page(findings) if as_text else as_json(findings), flush=True)
    return EnvironmentProblem.exit_code if worst(findings) == "FAIL" else 0


def examine_machine(
    disk: Path, need_gib: float, port: int | None, hosts: list[str], *, devices: bool = True
) -> list[Finding]:
    """Every check of this machine; `port` is None where it is in use by whoever started us, `devices`: GPUs too."""
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", machine.versions),
        ("libraries", machine.libraries),
        ("limits", machine.limits),
        ("disk", lambda: machine.disk(disk, need_gib)),
        ("shared memory", machine.shared_memory),
        ("names", lambda: machine.names(hosts)),
    ]
    if port is not None:
        checks.append(("port", lambda: machine.port(port)))
    findings = [finding for name, check in checks for finding in attempt(name, check)]
    return findings + (attempt("GPU", _gpus) if devices else [])


def attempt(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """What a check finds; if it breaks, that."""
    try:
        return check()
    except Exception as error:
        remedy = "this check could not be made; the message says what is in its way"
        return [Finding(name, "FAIL", f"{type(error).__name__}: {error}"[:300], remedy)]


def _gpus() -> list[Finding]:
    from ssa_megatron.doctor.gpu import gpus

    return gpus()[0]
