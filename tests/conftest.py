"""Marks the tests that start processes, and lists what was skipped with the command that enables it.

A test module whose text names one of the ways to start a process is marked `launch` as a whole. A test without the mark that
starts Python all the same fails, so `make test-quick` keeps its promise.
"""

import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

STARTS = re.compile(
    r"\bimport subprocess|\bmultiprocessing\b|\blaunch\.(run|start)\b|from tests\.launch import .*\b(run|start)\b|"
    r"\brun_(isolated|again)\b|from tests\.(cluster|faults)\b"
)
_unmarked: list[str] = []  # the test that runs now, if it must not start a process


@cache
def starts_processes(module: Path) -> bool:
    return STARTS.search(module.read_text()) is not None


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    for item in items:
        if starts_processes(item.path):
            item.add_marker(pytest.mark.launch)


def _refuse_python(event: str, arguments: tuple) -> None:
    if event == "subprocess.Popen" and _unmarked and str(arguments[1][0]).startswith(sys.executable):
        raise AssertionError(f"{_unmarked[-1]} starts a process; STARTS in tests/conftest.py must find its module")


sys.addaudithook(_refuse_python)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    if not any(map(item.get_closest_marker, ("launch", "slow", "gpu"))):
        _unmarked.append(item.nodeid)
    try:
        return (yield)
    finally:
        _unmarked.clear()


def pytest_terminal_summary(terminalreporter):
    """One line per reason, with the number of tests: each reason ends with the command that enables them."""
    counts: dict[str, int] = defaultdict(int)
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        counts[reason.removeprefix("Skipped: ")] += 1
    if counts:
        terminalreporter.section("skipped, and what enables them")
        for reason, count in sorted(counts.items()):
            terminalreporter.line(f"{count:4} {reason}")
