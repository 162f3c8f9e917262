"""Two processes under torchrun: rows by layout, a neighbour on the same dataset, and SIGKILL of the whole job."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from types import SimpleNamespace

import pytest

from tests import launch
from tests.pipelines.support import stream, take
from tests.pipelines.worker import digests


@pytest.fixture(scope="module")
def job(compressed, tmp_path_factory):
    """What two ranks read, and what a neighbour on the same shards read meanwhile; then the job is killed."""
    data = shutil.copytree(compressed, tmp_path_factory.mktemp("job") / "data")
    out = tmp_path_factory.mktemp("out")
    process = launch.start(2, "tests.pipelines.worker", str(data), str(out))
    neighbour = []
    try:
        rows, end = stream(data), time.monotonic() + 90
        while not all((out / f"rank-{rank}.json").exists() for rank in range(2)):
            assert process.poll() is None, f"the job ended: {process.stdout.read()}"
            assert time.monotonic() < end, "the job did not get going in 90 s"
            neighbour += digests(take(rows, 1)) if len(neighbour) < 240 else []
            time.sleep(0.02)
        neighbour += digests(take(rows, 240 - len(neighbour)))
    finally:
        reports = [json.loads(path.read_text()) for path in sorted(out.glob("rank-*.json"))]
        launch.kill(process)
        for report in reports:  # torchrun's workers may be in a session of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(report["pid"], signal.SIGKILL)
    cases = [json.loads((out / f"cases-{rank}.json").read_text()) for rank in range(2)]
    return SimpleNamespace(data=data, cases=cases, reports=reports, alone=neighbour)


def interleaved(job, case):
    return [digest for pair in zip(*(rank[case] for rank in job.cases), strict=True) for digest in pair]


def test_data_parallel_ranks_divide_the_sequence_of_one_process(job):
    assert interleaved(job, "dp") == job.alone[:180]


def test_tensor_parallel_ranks_see_the_same_rows(job):
    assert job.cases[0]["tp"] == job.cases[1]["tp"] == job.alone[:90]


def test_every_rank_resumes_from_the_state_of_one_in_the_same_or_another_layout(job):
    assert interleaved(job, "dp resumed") == job.alone[180:]
    assert job.cases[0]["dp to tp"] == job.cases[1]["dp to tp"] == job.alone[180:210]


def test_a_neighbour_on_the_same_shards_reads_undisturbed(job, prepared):
    assert job.alone == digests(take(stream(prepared), 240))


def test_after_sigkill_another_process_continues_at_once_from_the_last_position(job):
    state = job.reports[0]["state"]
    began = time.monotonic()
    after = stream(job.data)
    after.load_state_dict(state)
    rows = digests(take(after, 5))
    assert time.monotonic() - began < 5
    uninterrupted = stream(job.data)
    take(uninterrupted, state["samples_seen"] // 2)
    assert rows == digests(take(uninterrupted, 5))


def test_no_shared_memory_is_used_and_no_lock_or_partial_file_remains(job):
    assert [report["shared"] for report in job.reports] == [[], []]
    names = {path.name for path in (job.data / "train").iterdir()}
    assert {name for name in names if not re.fullmatch(r"shard\.\d{5}\.\d{5}\.mds(\.zstd)?", name)} == {"index.json"}


@pytest.mark.parametrize("paths", [("wait", "no/data"), ("no/data", "no/data")])
def test_an_error_before_the_rendezvous_is_printed_once_with_the_rank_that_raised_it(paths):
    output = launch.run(2, "tests.pipelines.early_error", *paths, timeout=60, expect=1)
    said = re.findall(r"^error\[not-a-dataset\]( of rank \d)?: no/data: ", output, re.MULTILINE)
    who = " of rank 1" if paths[0] == "wait" else ""
    assert said == [who], output
    assert output.count("remedy: ") == 1
