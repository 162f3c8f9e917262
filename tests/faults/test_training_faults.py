"""Things that break while a real training process runs: a shard one rank sees, a disk that fills, a line that was damaged."""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ssa_megatron.config import dump_recipe
from ssa_megatron.errors import RunFolderError
from ssa_megatron.train.metrics import Metrics, read_metrics
from tests import launch
from tests.errors import raises
from tests.ssa_megatron.conftest import corpus, dataset, tokenizer  # noqa: F401 (fixtures)
from tests.ssa_megatron.support import tiny


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_recipe(tiny(model__vocab_size=400, logging__tensorboard=False)))
    return path


def limited(kilobytes: int, *arguments: str) -> subprocess.CompletedProcess:
    """The command line where no file may grow beyond `kilobytes`: a full disk for whoever writes more."""
    shell = [
        "bash",
        "-c",
        f'ulimit -f {kilobytes}; exec "$@"',
        "bash",
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "ssa_megatron",
    ]
    return subprocess.run(
        [*shell, *arguments], cwd=launch.ROOT, env=launch.environment(), capture_output=True, text=True, timeout=120
    )


def test_a_damaged_row_seen_by_one_rank_stops_all_ranks_with_the_shards_name(tmp_path, recipe, dataset):  # noqa: F811
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    shard = max((data / "train").glob("*.mds"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    for at in range(len(content) // 2, len(content) - 8, 97):  # rows in the second half, header and size untouched
        content[at] ^= 1
    shard.write_bytes(content)
    began = time.monotonic()
    arguments = ["train", str(recipe), f"data.path={data}", "train.steps=40", "--run-folder", str(tmp_path / "run")]
    output = launch.run(
        2, "ssa_megatron", *arguments, timeout=120, expect=1
    )  # torchrun's own code, whatever the ranks'
    assert time.monotonic() - began < 60
    reported = re.findall(rf"^error\S*(?: of rank \d)?: shard {shard}: ", output, re.MULTILINE)
    assert len(reported) == 1, output[-3000:]
    assert "remedy: " in output
    assert "exitcode  : 3" in output
    assert "Connection closed" not in output


def test_a_run_whose_last_checkpoint_finds_no_room_does_not_end_as_if_all_were_well(tmp_path, recipe, dataset):  # noqa: F811
    run = tmp_path / "run"
    done = limited(60, "train", str(recipe), f"data.path={dataset}", "train.steps=2", "--run-folder", str(run))
    assert done.returncode == 7, done.stdout + done.stderr
    assert "CHECKPOINT of step 2 not written: rank 0: [Errno 27] File too large" in done.stdout
    assert "error[checkpoint-not-written]: " in done.stderr
    assert not [path for path in (run / "checkpoints").iterdir() if path.name != "latest"]


def test_a_disk_that_is_full_for_a_while_loses_no_line_of_the_metrics(tmp_path):
    code = """if 1:
        import resource, signal, sys
        from pathlib import Path
        from ssa_megatron.train.metrics import Metrics
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        metrics = Metrics(Path(sys.argv[1]), resume_step=0)
        said = []
        for step in range(1, 8):
            limit = 150 if 3 <= step <= 5 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            said.append(metrics.write(step, {"loss": 1.0 / step, "text": "x" * 30}))
        metrics.close()
        print([text is not None for text in said])
    """
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=launch.environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.lower()) == [False, False, True, True, True, False, False]
    assert [line["step"] for line in read_metrics(path)] == list(range(1, 8))


def test_a_damaged_line_of_the_metrics_is_named_and_takes_no_other_line_with_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 6)]
    for damaged in ("{", "17", '{"loss": 1.0}'):
        path.write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n")
        before = path.read_bytes()
        with raises(RunFolderError, "metrics-damaged", path, "line 2"):
            Metrics(path, resume_step=5)
        assert path.read_bytes() == before
