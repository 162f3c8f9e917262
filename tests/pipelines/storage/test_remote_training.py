"""Two ranks that train from an object store which vanishes or stalls in mid-epoch, with default settings, and comes back."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ssa_pipelines
from ssa_megatron.train.data import ledger_of_step
from ssa_megatron.train.metrics import read_metrics
from tests import launch
from tests.pipelines.object_store import access
from tests.pipelines.relay import relayed
from tests.ssa_megatron.support import recipe_file

pytestmark = pytest.mark.slow  # two minutes on two cores

RANKS, STEPS, BATCH = 2, 70, 8
LIMIT = 30  # seconds from the last step to the end of every rank


@pytest.fixture(scope="module")
def many_shards(documents, tmp_path_factory) -> Path:
    """A dataset of shards of some fifty rows, so that a store can vanish before all of them are here."""
    folder = tmp_path_factory.mktemp("many")
    tokenizer = ssa_pipelines.train_tokenizer(iter(documents), folder / "t.model", vocab_size=400)
    options = {"row_length": 33, "validation_fraction": 0.0, "part_bytes": 5000}
    ssa_pipelines.prepare(iter(documents), tokenizer, folder / "data", **options)
    assert len(list((folder / "data" / "train").glob("*.mds"))) > 40
    return folder / "data"


def start(recipe: Path, data: str, run: Path, **environment: str) -> list[subprocess.Popen]:
    """Both ranks, without a launcher, whose end would end the other one too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    meeting = {
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-W", "ignore", "-m", "ssa_megatron", "train", str(recipe), f"data.path={data}"]
    return [
        subprocess.Popen(
            [*command, "--run-folder", str(run)],
            cwd=launch.ROOT,
            env=launch.environment(**meeting, RANK=str(rank), LOCAL_RANK=str(rank), **environment),
            text=True,
            stdout=(run.parent / f"{run.name}-{rank}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(RANKS)
    ]


def ended(ranks: list[subprocess.Popen], seconds: float) -> list[int]:
    """The ranks' exit codes; what is not over in time is killed, and its code is -9."""
    end = time.monotonic() + seconds
    for rank in ranks:
        try:
            rank.wait(max(end - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            rank.kill()
    return [rank.wait() for rank in ranks]


def losses(run: Path) -> list[tuple[int, float]]:
    path = run / "metrics.jsonl"
    return [(line["step"], line["loss"]) for line in read_metrics(path)] if path.exists() else []


def recipe_in(folder: Path, data: Path) -> Path:
    options = {"model__vocab_size": 400, "train__global_batch_rows": BATCH, "train__eval_interval": 0}
    options |= {"checkpoint__interval": 10, "data__cache": str(folder / "cache"), "data__shuffle_block": 1}
    return recipe_file(folder, data, train__steps=STEPS, **options)


@pytest.fixture(scope="module")
def expected(many_shards, tmp_path_factory) -> list[tuple[int, float]]:
    """The losses of an uninterrupted run on two ranks, from a folder."""
    folder = tmp_path_factory.mktemp("whole")
    codes = ended(start(recipe_in(folder, many_shards), str(many_shards), folder / "run"), 120)
    assert codes == [0, 0], (folder / "run-0.log").read_text()
    return losses(folder / "run")


@pytest.mark.parametrize("fault", ["gone", "silent"])
def test_a_store_that_fails_in_mid_epoch_ends_both_ranks_within_30_s_and_the_run_continues_when_it_is_back(
    s3, many_shards, expected, tmp_path, fault
):
    recipe = recipe_in(tmp_path, many_shards)
    url, run = s3.put_folder(many_shards, "data"), tmp_path / "run"
    with relayed(s3) as relay:
        ranks = start(recipe, url, run, **access(relay.url))
        while len(losses(run)) < 2 and all(rank.poll() is None for rank in ranks):
            time.sleep(0.02)
        if fault == "gone":
            relay.gone()
        else:
            relay.silent = True
        codes = ended(ranks, 90)  # rows that were fetched ahead come first
        seconds = time.time() - (run / "metrics.jsonl").stat().st_mtime
        said = [(tmp_path / f"run-{rank}.log").read_text() for rank in range(RANKS)]
        assert codes == [3, 3], said
        assert seconds < LIMIT
        assert sum(text.count(f"error[object-stalled]: shard {url}/train/shard.") for text in said) == 1, said
        assert "20 s" in "".join(said)
        assert "Traceback" not in "".join(said)
        done = losses(run)
        assert 2 < len(done) < STEPS
        assert done == expected[: len(done)]

        if fault == "gone":
            relay.back()
        else:
            relay.silent = False
        rows = [row for step in range(1, len(done) + 1) for row in ledger_of_step(run, step)]
        assert len(rows) == len(done) * BATCH == len({(row["source"], row["epoch"], row["row"]) for row in rows})
        assert ended(start(recipe, url, run, **access(relay.url)), 120) == [0, 0]
    assert losses(run) == expected
    print(f"ended {seconds:.1f} s after the last step, {len(done)} steps done")
