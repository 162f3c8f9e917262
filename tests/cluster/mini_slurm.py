"""A real SLURM of two nodes on one machine, in a folder of its own: munged, slurmctld, and a slurmd for n1 and one for n2.

Needs root and Debian's slurm-wlm and munge (`apt-get install slurm-wlm munge`); `why_not` says what is missing. Ports, keys,
state and logs are the folder's, so it disturbs nothing else, and `stop` leaves no process behind.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil

from tests import launch

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
CONFIG = """\
ClusterName=mini
SlurmctldHost=localhost
SlurmctldPort={controller}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
OverTimeLimit=0
MinJobAge=3600
InactiveLimit=0
SlurmctldTimeout=30
SlurmdTimeout=30
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={first} CPUs=4 RealMemory=4000
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={second} CPUs=4 RealMemory=4000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=60 State=UP OverSubscribe=NO PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP OverSubscribe=NO PriorityTier=9 PreemptMode=OFF
"""


def why_not() -> str | None:
    """What this machine lacks to run a SLURM of its own; None when it has everything."""
    missing = [name for name in PROGRAMS if not _find(name)]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd starts jobs as other users, so this test needs root"
    return None


class MiniSlurm:
    """The cluster's commands, with its configuration; use it as a context manager."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = launch.environment(SLURM_CONF=str(folder / "slurm.conf"))
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> "MiniSlurm":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def command(self, *arguments: str, timeout: float = 60) -> str:
        """Standard output of a SLURM command, which must succeed."""
        done = subprocess.run(arguments, env=self.environment, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{arguments} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows: JobState, ExitCode, Restarts, BatchHost, ..."""
        text = self.command("scontrol", "--oneliner", "show", "job", job)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def wait(self, job: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until the job is in one of `states`; fails with all that is known when it is not in time."""
        deadline = time.monotonic() + timeout
        while (found := self.job(job))["JobState"] not in states:
            assert time.monotonic() < deadline, f"job {job} not {states} within {timeout} s: {found}\n{self.logs()}"
            time.sleep(0.3)
        return found

    def logs(self, lines: int = 15) -> str:
        """The ends of the daemons' logs."""
        texts = {path.name: path.read_text(errors="replace") for path in sorted(self.folder.glob("*.log"))}
        return "\n".join(f"--- {name}\n" + "\n".join(text.splitlines()[-lines:]) for name, text in texts.items())

    def stop(self) -> None:
        """Cancel every job, end the daemons, and kill whatever a step has left."""
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.command("scancel", "--user=root", timeout=20)
        steps = [p for p in psutil.process_iter() if self._is_step(p)]
        family = [*steps, *(child for step in steps for child in step.children(recursive=True))]
        for process in (*family, *reversed(self._daemons)):
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL if process in family else signal.SIGTERM)
        for daemon in self._daemons:
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def _is_step(self, process: psutil.Process) -> bool:
        try:
            return (
                "slurmstepd" in process.name() and process.environ().get("SLURM_CONF") == self.environment["SLURM_CONF"]
            )
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def _start(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        for node in ("n1", "n2"):
            (self.folder / f"spool-{node}").mkdir()
        controller, first, second = _free_ports(3)
        config = CONFIG.format(folder=self.folder, controller=controller, first=first, second=second)
        (self.folder / "slurm.conf").write_text(config)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        options = [f"--{option}={self.folder}/munge.{end}" for option, end in files.items()]
        self._daemon("munged", "--foreground", "--force", *options)
        _until(lambda: (self.folder / "munge.socket").exists(), 20, "munged made no socket", self.logs)
        self._daemon("slurmctld", "-D")
        for node in ("n1", "n2"):
            self._daemon("slurmd", "-D", "-N", node)
        idle = ["sinfo", "--noheader", "--states=idle", "--Node", "--format=%N"]

        def ready() -> bool:
            done = subprocess.run(idle, env=self.environment, capture_output=True, text=True, timeout=30)
            return set(done.stdout.split()) == {"n1", "n2"}  # once a partition

        _until(ready, 60, "n1 and n2 are not idle", self.logs)

    def _daemon(self, name: str, *arguments: str) -> None:
        # A new session: a Ctrl-C at the tests must not end the cluster before its jobs are cancelled.
        log = (self.folder / f"{name}-{len(self._daemons)}.log").open("w")
        command = [_find(name), *arguments]
        with log:
            self._daemons.append(
                subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            )


def _find(name: str) -> str | None:
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _until(condition, seconds: float, problem: str, logs) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{problem} within {seconds} s\n{logs()}"
        time.sleep(0.1)
