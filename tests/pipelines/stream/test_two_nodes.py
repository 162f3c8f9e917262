"""Two simulated nodes on a real S3 API: killed twenty times, moved between layouts, staged; the ledger never differs."""

import itertools
import json
import random

import pytest

from tests import launch
from tests.pipelines.cluster_worker import BATCH, MICRO
from tests.pipelines.object_store import access
from tests.pipelines.support import stream, take
from tests.pipelines.worker import digests

pytestmark = pytest.mark.slow  # about a minute on two cores

STEPS = 400
KILLS = 20


def attempt(*, dp=2, pp=1, tp=1, steps=STEPS, kill_after=None) -> dict:
    return {"dp": dp, "pp": pp, "tp": tp, "steps": steps, "kill_after": kill_after}


@pytest.fixture(scope="module")
def job(tmp_path_factory, documents, tokenizer):
    """All runs in one start of Python; each case below looks at one of them."""
    import ssa_pipelines
    from tests.pipelines.object_store import object_store
    from tests.pipelines.support import SETTINGS

    folder, draw = tmp_path_factory.mktemp("cluster"), random.Random(5)
    with object_store() as store:
        ssa_pipelines.prepare(iter(documents), tokenizer, "s3://bucket/data", compression="zstd:3",
                          scratch=folder / "scratch", **SETTINGS)  # fmt: skip
        runs = {
            "killed": [attempt(dp=4, kill_after=draw.uniform(0, 0.4)) for _ in range(KILLS)] + [attempt(dp=4)],
            "moved": [attempt(dp=4, steps=40), attempt(dp=2, steps=90), attempt(dp=8, steps=150)],
            "staged": [attempt(dp=2, pp=2, tp=2, steps=60)],
        }
        (folder / "job.json").write_text(json.dumps({"url": "s3://bucket/data", "folder": str(folder), "runs": runs}))
        output = launch.run(
            1, "tests.pipelines.cluster_worker", str(folder / "job.json"), timeout=280, **access(store.url)
        )
    return folder, output


@pytest.fixture(scope="module")
def expected(prepared):
    """Digest of the micro-batch that begins at each row of the run, from one uninterrupted process and a local folder."""
    found = digests(take(stream(prepared, micro=MICRO, batch=BATCH), STEPS * BATCH // MICRO))
    return {k * MICRO: digest for k, digest in enumerate(found)}


def seen(folder, run: str) -> dict[str, list[dict]]:
    """What each rank wrote down; a line that a kill cut short was not delivered."""
    lines = {}
    for path in sorted((folder / run).glob("seen-*.jsonl")):
        *whole, last = path.read_text().split("\n")
        lines[path.stem] = [json.loads(line) for line in whole if line.endswith("}")]
        assert last == "" or not last.endswith("}")
    return lines


def test_after_twenty_kills_of_everything_the_ledger_is_that_of_an_uninterrupted_run(job, expected):
    folder, output = job
    codes = json.loads((folder / "killed" / "codes.json").read_text())
    assert all(set(attempt) <= {-9, 0} for attempt in codes[:-1]), output
    assert sum(-9 in attempt for attempt in codes) >= KILLS // 2
    assert codes[-1] == [0] * 4
    final: dict[int, str] = {}
    for lines in seen(folder, "killed").values():
        for line in lines:
            assert line["digest"] == expected[line["first"]]  # also of steps that were done again
            final[line["first"]] = line["digest"]
    assert final == expected


def test_every_attempt_continues_at_the_last_committed_step_without_a_gap(job):
    folder, _ = job
    for lines in seen(folder, "killed").values():
        for before, after in itertools.pairwise(lines):
            assert after["step"] <= before["step"] + 1  # no gap; less only right after a kill


def test_four_ranks_then_two_then_eight_continue_one_sequence(job, expected):
    folder, output = job
    codes = json.loads((folder / "moved" / "codes.json").read_text())
    assert codes == [[0] * 4, [0] * 2, [0] * 8], output
    lines = [line for lines in seen(folder, "moved").values() for line in lines]
    found = {line["first"]: line["digest"] for line in lines}
    assert len(lines) == len(found)  # nothing twice
    assert found == {first: digest for first, digest in expected.items() if first < 150 * BATCH}


def test_pipeline_and_tensor_ranks_of_a_replica_see_identical_rows(job, expected):
    folder, output = job
    assert json.loads((folder / "staged" / "codes.json").read_text()) == [[0] * 8], output
    ranks = seen(folder, "staged")
    assert sorted(ranks) == [f"seen-{dp}-{stage}" for dp in range(2) for stage in range(4)]
    for dp in range(2):
        first = ranks[f"seen-{dp}-0"]
        assert [line["digest"] for line in first] == [expected[line["first"]] for line in first]
        assert all(ranks[f"seen-{dp}-{stage}"] == first for stage in range(4))
    assert {line["first"] for lines in ranks.values() for line in lines} == set(range(0, 60 * BATCH, MICRO))
