"""Lines that nobody can read any more are dropped; nothing ends because of them."""

import subprocess
import sys

import pytest

from tests.launch import ROOT, environment

PRINTS = """
import sys
from ssa_megatron.train.output import outlive_readers
outlive_readers()
for number in range(20_000):
    print(number)
    print("Grüße", file=sys.stderr, flush=True)
sys.exit(75)
"""


LOGS = """
import logging
from ssa_megatron.train.output import log_to_stderr, outlive_readers
outlive_readers()
log_to_stderr()
log_to_stderr()
logging.getLogger("ssa.watchdog").warning("rank %d is silent", 3)
logging.getLogger("ssa.watchdog").debug("not shown")
"""


def run(program: str = PRINTS, **streams) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), timeout=60, **streams)


def test_every_line_arrives_where_somebody_reads():
    done = run(capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stdout.split() == [str(number) for number in range(20_000)]
    assert done.stderr == "Grüße\n" * 20_000


def test_a_full_disk_under_the_log_ends_nothing():
    with open("/dev/full", "w") as full:
        assert run(stdout=full, stderr=full).returncode == 75


@pytest.mark.parametrize("streams", [">&- 2>&-", "| head -n 1"])
def test_a_stream_that_is_closed_and_a_pipe_whose_reader_has_ended_end_nothing(streams):
    shell = f'set -o pipefail; "$0" -c "$1" {streams}'
    done = subprocess.run(
        ["bash", "-c", shell, sys.executable, PRINTS],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=60,
    )
    assert done.returncode == 75


def test_what_is_logged_names_its_component_once():
    done = run(LOGS, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "watchdog: rank 3 is silent\n")


def test_what_is_logged_to_a_full_disk_ends_nothing():
    with open("/dev/full", "w") as full:
        assert run(LOGS, stdout=full, stderr=full).returncode == 0
