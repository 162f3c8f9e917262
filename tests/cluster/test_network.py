"""Two machines, as far as the network can tell: two namespaces with an address each and a router between them, which can stop.

Cutting the link is what a broken switch does: packets vanish, nobody is told, and every connection looks alive.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ssa_megatron.train.metrics import read_metrics
from ssa_megatron.train.restarts import read_starts
from tests import launch
from tests.cluster.conftest import SMALL
from tests.ssa_megatron.train.test_resume import figures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
FIRST, SECOND = "10.99.1.2", "10.99.2.2"
PREFIX = f"ssa{os.getpid()}"


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"ip {arguments}: {done.stderr}"


class Network:
    """Namespaces PREFIXa and PREFIXb, and PREFIXr between them."""

    def __enter__(self) -> "Network":
        self.__exit__()
        for name in "abr":
            ip("netns", "add", PREFIX + name)
            self._inside(name, "ip", "link", "set", "lo", "up")
        for name, address, gateway in (("a", FIRST, "10.99.1.1"), ("b", SECOND, "10.99.2.1")):
            end = ("link", "add", "net0", "netns", PREFIX + name, "type", "veth")
            ip(*end, "peer", "name", f"to-{name}", "netns", PREFIX + "r")
            self._inside("r", "ip", "address", "add", f"{gateway}/24", "dev", f"to-{name}")
            self._inside("r", "ip", "link", "set", f"to-{name}", "up")
            self._inside(name, "ip", "address", "add", f"{address}/24", "dev", "net0")
            self._inside(name, "ip", "link", "set", "net0", "up")
            self._inside(name, "ip", "route", "add", "default", "via", gateway)
        self.mend()
        return self

    def names(self, **hosts: str) -> None:
        """What each machine's /etc/hosts says, by its letter; `ip netns exec` mounts it there."""
        for name, text in hosts.items():
            folder = Path("/etc/netns") / (PREFIX + name)
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + text + "\n")

    def __exit__(self, *_) -> None:
        for name in "abr":
            shutil.rmtree(Path("/etc/netns") / (PREFIX + name), ignore_errors=True)
            with contextlib.suppress(AssertionError):
                ip("netns", "delete", PREFIX + name)

    def mend(self) -> None:
        self._forward(1)

    def cut(self) -> None:
        self._forward(0)

    def _forward(self, value: int) -> None:
        self._inside("r", "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/ip_forward")

    def _inside(self, name: str, *command: str) -> None:
        ip("netns", "exec", PREFIX + name, *command)


class Node:
    """A launcher in one of the namespaces; its output in a file."""

    def __init__(self, name: str, rank: int, log: Path, *arguments: str, host: str = FIRST):
        self.log_path, self._log = log, log.open("w")
        command = ["ip", "netns", "exec", PREFIX + name, sys.executable, "-m", "ssa_cluster.launch"]
        command += ["--host", host, "--node-rank", str(rank), *arguments]
        self.process = subprocess.Popen(
            command, cwd=launch.ROOT, env=launch.environment(), stdout=self._log, stderr=self._log
        )

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def says(self, pattern: str, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while not (found := re.search(pattern, self.log)):
            assert time.monotonic() < deadline, f"{pattern!r} not said within {timeout} s:\n{self.log}"
            assert self.process.poll() is None, f"ended with {self.process.returncode}:\n{self.log}"
            time.sleep(0.1)
        return found[0]

    def end(self, timeout: float) -> None:
        assert self.process.wait(timeout=timeout) == 0, self.log

    def kill(self) -> None:
        launch.kill(self.process)
        self._log.close()


@pytest.fixture
def network():
    if os.geteuid() != 0:
        pytest.skip("NO NETWORK TEST RAN: network namespaces need root")
    try:
        with Network() as made:
            yield made
    except FileNotFoundError:
        pytest.skip("NO NETWORK TEST RAN: no `ip` here: apt-get install iproute2")


@contextlib.contextmanager
def two_nodes(tmp_path: Path, data: Path, nodes: str, host: str = FIRST):
    command = ("train", "demo", *SMALL, f"data.path={data}", "--run-folder", str(tmp_path / "run"))
    options = ("--nodes", nodes, "--silence", "8", "--id", PREFIX, *command)
    first = Node("a", 0, tmp_path / "first.log", *options, host=host)
    second = Node("b", 1, tmp_path / "second.log", *options, host=host)
    try:
        yield first, second
    finally:
        first.kill()
        second.kill()


def reach(run: Path, step: int, node: Node, timeout: float = 400) -> None:
    deadline = time.monotonic() + timeout
    path = run / "metrics.jsonl"
    while not path.exists() or not any(line["step"] >= step for line in read_metrics(path)):
        assert time.monotonic() < deadline, f"step {step} not within {timeout} s:\n{node.log}"
        time.sleep(0.1)


def check_elastic(run: Path, whole: Path) -> None:
    """Each step once; losses equal to rounding, whatever the number of nodes was."""
    lines, expected = read_metrics(run / "metrics.jsonl"), read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5), line["step"]


def test_two_machines_meet_train_and_end_together(network, tmp_path, data, whole):
    with two_nodes(tmp_path, data, "2") as (first, second):
        first.end(400)
        second.end(60)
        assert f"({os.uname().nodename}, {SECOND})" in second.log
        assert figures(tmp_path / "run") == figures(whole)


def test_a_first_node_that_calls_itself_127_0_1_1_is_met_by_its_name_with_a_domain(network, tmp_path, data, whole):
    """Debian's /etc/hosts. Once lost: it told the other to connect to 127.0.0.1, which waited for itself."""
    name = "node-a.cluster.example"
    network.names(a=f"127.0.1.1 {name}", b=f"{FIRST} {name}")
    with two_nodes(tmp_path, data, "2", host=name) as (first, second):
        first.end(400)
        second.end(60)
        assert f", {FIRST}) of 2" in first.log
        assert figures(tmp_path / "run") == figures(whole)


def test_a_cut_link_is_noticed_and_named_and_the_run_goes_on_alone_then_together_again(network, tmp_path, data, whole):
    run = tmp_path / "run"
    with two_nodes(tmp_path, data, "1:2") as (first, second):
        reach(run, 12, first)
        network.cut()
        cut = time.monotonic()
        lost = first.says(r"launch: node 1 of 2 \(.*\) has been silent for \d+ s: restarting without it", 30)
        first_knew = time.monotonic() - cut
        assert SECOND in lost
        second.says(rf"launch: the rendezvous host has not answered this node \(.* at {SECOND}\) for \d+ s", 30)
        print(f"cut noticed after {first_knew:.1f} s and {time.monotonic() - cut:.1f} s")
        first.says(
            r"1 process\(es\) on cpu, data 1[\s\S]*starting at step", 300
        )  # metrics.jsonl has steps of before until then
        reach(run, 12, first)
        [rank] = psutil.Process(first.process.pid).children(recursive=True)
        rank.suspend()  # or it would be done before the other has loaded its libraries
        network.mend()
        first.says(r"launch: 1 node\(s\) want to join", 300)
        rank.resume()
        first.end(400)
        second.end(60)
        assert [start.world for start in read_starts(run)] == [2, 1, 2]
        assert read_starts(run)[1].ended.startswith(
            "stopped by "
        )  # a checkpoint before the other joins: nothing is lost
        check_elastic(run, whole)


def test_where_two_nodes_are_wanted_a_cut_link_is_waited_for(network, tmp_path, data, whole):
    run = tmp_path / "run"
    with two_nodes(tmp_path, data, "2") as (first, second):
        reach(run, 12, first)
        network.cut()
        first.says("silent for", 30)
        second.says("has not answered", 30)
        time.sleep(5)
        network.mend()
        first.end(400)
        second.end(60)
        assert [start.world for start in read_starts(run)] == [2, 2]
        assert figures(run) == figures(whole)
