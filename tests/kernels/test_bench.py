"""What docs/performance.md says was measured is what the benchmark's files hold, and tables and picture agree with it."""

import csv
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import picture as bench_picture
from benchmarks import tables as bench_tables
from benchmarks import targets as bench_targets

HERE = Path(bench_targets.__file__).parent
WORDS = {"date", "device", "torch", "triton", "commit", "shape", "selection", "what", "note"}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    with (HERE / "results" / "attention-h100.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    return [{k: v if k in WORDS else float(v) for k, v in row.items() if v or k == "note"} for row in found]


def test_the_tables_of_the_documentation_are_those_of_the_rows(rows):
    text = (HERE.parents[1] / "docs" / "performance.md").read_text()
    assert bench_tables.times(rows, "random") in text
    assert bench_targets.table(rows) in text
    assert {row["commit"] for row in rows} == set(re.findall(r"## Attention kernels\n.*?commit (\w+)", text, re.S))


def test_the_picture_is_that_of_its_rows():
    drawn = bench_picture.draw(*bench_picture.read(HERE / "results" / "attention-h100-picture.csv"))
    assert drawn == (HERE / "results" / "attention-h100.svg").read_text()
    tree = ElementTree.fromstring(drawn)
    points = [x.text for x in tree.iter() if x.tag.endswith("title")]
    assert "SSA, trunk full, 128k tokens: 607.1" in points
    assert len(points) == 2 * len(bench_picture.LINES) * 8  # time and memory, 1k to 128k


def of_runs(*values: float, note: str = "") -> list[dict]:
    """Rows of SSA at A 32k whose ratios to cuDNN are these, a run each."""
    shared = {"shape": "A 32k", "selection": "random", "note": note}
    return [
        shared | {"run": run, "what": f"SSA, trunk {trunk}", "both_to_cudnn": value - (trunk == "sparse")}
        for run, value in enumerate(values)
        for trunk in ("full", "sparse")
    ]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (of_runs(1.10, 1.14, 1.30), "1.14 (1.1 to 1.3, 3 runs) | yes |"),  # the median, of the slower trunk
        (of_runs(1.05), "1.05 | stretch |"),
        (of_runs(1.16), "1.16 | NO |"),
        (of_runs(1.05, note="FAILED accuracy: 3 times the tolerance"), "not measured | - |"),
        ([], "not measured | - |"),
    ],
)
def test_a_target_is_met_by_the_median_of_sound_rows_alone(rows, said):
    lines = [line for line in bench_targets.table(rows).splitlines() if line.startswith("| SSA, A 32k")]
    assert len(lines) == 1
    assert lines[0].endswith(said)
