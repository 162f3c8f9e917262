"""What a check found: a level, the value, and what to do about it; and how findings are shown.

OK needs nothing, WARN will cost speed or trouble, FAIL will end or prevent training. Every WARN and FAIL has a remedy.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

LEVELS = ("OK", "WARN", "FAIL")


@dataclass(frozen=True)
class Finding:
    check: str
    level: str
    found: str
    remedy: str = ""
    host: str = ""
    """Where, when several machines were looked at."""

    def __post_init__(self):
        assert self.level in LEVELS, self.level
        assert self.level == "OK" or self.remedy, f"{self.check}: {self.found} has no remedy"


def worst(findings: Iterable[Finding]) -> str:
    return max((finding.level for finding in findings), key=LEVELS.index, default="OK")


def page(findings: list[Finding]) -> str:
    """One line a finding, its remedy below it; equal findings of several machines are one line."""
    hosts: dict[tuple, list[str]] = {}
    for finding in findings:
        hosts.setdefault((finding.check, finding.level, finding.found, finding.remedy), []).append(finding.host)
    width = max((len(check) for check, *_ in hosts), default=0)
    lines = []
    for (check, level, found, remedy), where in hosts.items():
        names = ", ".join(where[:6]) + (f" and {len(where) - 6} more" if len(where) > 6 else "")
        lines.append(f"{level:<5} {check:<{width}}  {found}" + (f"  [{names}]" if any(where) else ""))
        if remedy:
            lines.append(f"{'':<5} {'':<{width}}  remedy: {remedy}")
    counts = {level: sum(finding.level == level for finding in findings) for level in LEVELS}
    lines.append(f"\n{counts['FAIL']} FAIL, {counts['WARN']} WARN, {counts['OK']} OK")
    return "\n".join(lines)


def as_json(findings: list[Finding]) -> str:
    return json.dumps({"worst": worst(findings), "findings": [asdict(finding) for finding in findings]}, indent=1)
