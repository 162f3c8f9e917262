"""`--profile a:b`: exactly these steps are recorded, and a wrong range is refused by name."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

from ssa_megatron.errors import ConfigError
from ssa_megatron.train.console import Console
from ssa_megatron.train.profile_request import parse_range
from ssa_megatron.train.profiler import StepProfiler
from tests.errors import raises


@pytest.mark.parametrize("text", ["3", "3:2", "0:4", "a:b", ":", "1:2:3", "-1:3"])
def test_a_wrong_range_is_refused(text):
    with raises(ConfigError, "profile-range", text):
        parse_range(text)


class Said(Console):
    """A console that keeps its lines."""

    def __init__(self):
        super().__init__(total_steps=5, interval=1, enabled=False)
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def test_only_the_steps_asked_for_are_recorded(tmp_path):
    parallel = SimpleNamespace(rank=3, dp_rank=0, device=torch.device("cpu"))
    said = Said()
    profiler = StepProfiler(parse_range("2:3"), tmp_path / "profile", parallel, said)
    for step in range(1, 6):
        profiler.before_step(step)
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(4).sum()
        profiler.after_step(step, {})
        assert bool(said.lines) == (step >= 3)
    trace = json.loads(gzip.decompress((tmp_path / "profile/steps-2-3-rank-3.json.gz").read_bytes()))
    recorded = {event["name"] for event in trace["traceEvents"] if event["name"].startswith("work of step")}
    assert recorded == {"work of step 2", "work of step 3"}
    assert "work of step 2" in (tmp_path / "profile/steps-2-3-rank-3.txt").read_text()


def test_one_data_parallel_rank_records(tmp_path):
    parallel = SimpleNamespace(rank=1, dp_rank=1, device=torch.device("cpu"))
    said = Said()
    profiler = StepProfiler(parse_range("1:1"), tmp_path / "profile", parallel, said)
    profiler.before_step(1)
    profiler.after_step(1, {})
    assert not said.lines
    assert not (tmp_path / "profile").exists()
