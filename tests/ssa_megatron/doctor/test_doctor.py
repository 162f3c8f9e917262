"""`ssa doctor`: each way a machine can be unfit is provoked for real, and named with its remedy."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from ssa_megatron.doctor import machine, ranks
from ssa_megatron.doctor.cluster import outliers
from ssa_megatron.doctor.device_speed import Speed
from ssa_megatron.doctor.finding import Finding, as_json, page, worst
from ssa_megatron.doctor.gpu import expected, rates
from ssa_megatron.errors import ConfigError
from ssa_megatron.planning.hardware import TABLE
from tests import launch
from tests.errors import raises


def levels(findings: list[Finding]) -> list[str]:
    return [finding.level for finding in findings]


def only(findings: list[Finding]) -> Finding:
    [finding] = findings
    return finding


# ------------------------------------------------------------------------------------------------------------- network
def test_a_port_in_use_is_named_with_the_process_that_has_it():
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        number = holder.getsockname()[1]
        found = only(machine.port(number))
        assert found.level == "FAIL"
        assert found.found.startswith(f"{number} cannot be bound: Address already in use; process {os.getpid()}, ")
        assert f"--port {number + 1}" in found.remedy
    assert levels(machine.port(number)) == ["OK"]


def test_a_host_name_that_does_not_exist_is_named():
    found = [finding for finding in machine.names(["no-such-host.invalid", "localhost"]) if finding.level == "FAIL"]
    assert "no-such-host.invalid cannot be resolved" in only(found).found
    assert "/etc/hosts" in only(found).remedy


# ---------------------------------------------------------------------------------------------------------------- disk
def test_a_disk_that_takes_no_more_is_found_by_writing_to_it(tmp_path):
    code = """if 1:
        import sys
        from pathlib import Path
        from ssa_megatron.doctor import machine
        print(machine.disk(Path(sys.argv[1]), 0))
    """
    shell = ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(shell, env=launch.environment(), capture_output=True, text=True, timeout=60, check=True)
    assert "level='FAIL'" in done.stdout
    assert "64 MiB could not be written: File too large" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root: sudo")
def test_a_full_file_system_is_found(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    try:
        found = machine.disk(small / "runs" / "new", 0)
        assert only(found).level == "FAIL"
        assert "No space left on device" in only(found).found
        assert not list(small.iterdir())
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_too_little_room_is_said_before_it_is_needed(tmp_path):
    found = machine.disk(tmp_path, 1e9)
    assert "GiB free, 1e+09 wanted" in found[0].found
    assert levels(found) == ["FAIL", "OK"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    found = only(machine.disk(Path("/proc/self"), 0))
    assert found.level == "FAIL"
    assert "64 MiB could not be written" in found.found


# ------------------------------------------------------------------------------------------------------- shared memory
@pytest.fixture
def segment():
    """A segment in /dev/shm named as torch names them, two minutes old."""
    path = machine.SHARED / f"torch_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    path.write_bytes(bytes(4096))
    os.utime(path, (time.time() - 120,) * 2)
    yield path
    path.unlink(missing_ok=True)


def test_a_segment_that_a_dead_process_left_is_found_and_the_remedy_removes_it(segment):
    found = [finding for finding in machine.shared_memory() if str(segment) in finding.remedy]
    assert only(found).level == "FAIL"
    assert only(found).remedy.startswith("rm /dev/shm/")
    segment.unlink()
    assert segment not in machine.leftovers()


def test_the_segment_of_a_living_neighbour_job_is_left_alone(segment):
    code = """if 1:
        import mmap, sys, time
        with open(sys.argv[1], "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        print("mapped", flush=True)
        time.sleep(60)
    """
    neighbour = subprocess.Popen([sys.executable, "-c", code, str(segment)], stdout=subprocess.PIPE, text=True)
    try:
        assert neighbour.stdout.readline() == "mapped\n"
        assert segment not in machine.leftovers()
        os.kill(neighbour.pid, signal.SIGKILL)
        neighbour.wait(timeout=10)
        assert segment in machine.leftovers()
    finally:
        neighbour.kill()
        neighbour.communicate()


def test_what_is_new_or_another_programs_is_not_called_left_behind():
    other = shared_memory.SharedMemory(create=True, size=16, name=f"somebody-else-{uuid.uuid4().hex}")
    new = machine.SHARED / f"torch_1_{uuid.uuid4().hex[:8]}"
    try:
        os.utime(machine.SHARED / other.name, (time.time() - 600,) * 2)
        new.write_bytes(b"x")
        other.close()
        assert not {new, machine.SHARED / other.name} & set(machine.leftovers())
    finally:
        other.unlink()
        new.unlink()


# ----------------------------------------------------------------------------------------------------------- libraries
def test_a_library_that_lacks_a_shared_object_is_found_by_importing_it(tmp_path, monkeypatch):
    (tmp_path / "sentencepiece.py").write_text("import ctypes\nctypes.CDLL('libnot-here.so.3')\n")
    (tmp_path / "pyarrow.py").write_text("raise ModuleNotFoundError('No module named pyarrow.lib')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    few = {"sentencepiece": "sentencepiece", "pyarrow": "pyarrow", "PyYAML": "yaml"}
    monkeypatch.setattr(machine, "LIBRARIES", few)
    library, module = machine.libraries()
    assert "import sentencepiece: OSError: libnot-here.so.3: cannot open shared object file" in library.found
    assert "install the system library" in library.remedy
    assert "No module named pyarrow.lib" in module.found
    assert levels([library, module]) == ["FAIL", "FAIL"]


def test_a_library_whose_import_kills_the_process_is_named(tmp_path, monkeypatch):
    (tmp_path / "yaml.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(machine, "LIBRARIES", {"typer": "typer", "PyYAML": "yaml"})
    found = only(machine.libraries())
    assert found.level == "FAIL"
    assert found.found.startswith("import yaml ended the process")


def test_versions_are_compared_with_the_requirements(tmp_path):
    pins = tmp_path / "requirements.txt"
    text = machine.REQUIREMENTS.read_text()
    pins.write_text(text.replace("PyYAML==6.0.3", "PyYAML==5.1").replace("typer==", "typer==9"))
    level = {finding.level: finding for finding in machine.versions(pins)}
    assert level.keys() == {"OK", "WARN"}
    assert "PyYAML 6.0.3, not 5.1; typer" in level["WARN"].found
    assert "pip install PyYAML==5.1 typer==9" in level["WARN"].remedy


def test_every_library_that_is_imported_is_pinned():
    text = machine.REQUIREMENTS.read_text()
    assert [name for name in machine.LIBRARIES if f"\n{name}==" not in text] == []


def test_a_wheel_is_compared_with_its_own_metadata(tmp_path, monkeypatch):
    """Regression: installed as a wheel, no requirements.txt was there and no version was compared."""
    needs = ["torch==2.13.0", "pyyaml==5.1", "backports-zstd==1.8.0", 'moto[s3]==5.2.5; extra == "dev"']
    monkeypatch.setattr(machine, "LIBRARIES", {"torch": "torch", "PyYAML": "yaml"})
    monkeypatch.setattr(machine.metadata, "requires", lambda name: needs)
    absent = tmp_path / "requirements.txt"
    assert machine.pins(absent)["moto"] == "5.2.5"
    fits, warning = machine.versions(absent)
    assert fits.found.endswith("1 of 2 as required")
    assert warning.found == "PyYAML 6.0.3, not 5.1"
    assert warning.remedy.endswith("pip install PyYAML==5.1")


def test_without_pins_the_doctor_reports_that_nothing_was_compared(tmp_path, monkeypatch):
    def not_installed(name):
        raise machine.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(machine.metadata, "requires", not_installed)
    assert levels(machine.versions(tmp_path / "requirements.txt")) == ["WARN"]


# -------------------------------------------------------------------------------------------------------------- speeds
def test_a_gpu_is_judged_by_the_table_the_plan_uses():
    row = TABLE["h100"]
    assert expected("NVIDIA H100 80GB HBM3") == row
    assert expected("NVIDIA T4") is None
    for share, level in ((1.05, "OK"), (0.85, "WARN"), (0.5, "FAIL")):
        speed = Speed(share * row.matmul, row.bandwidth)
        assert levels(rates("GPU 0", speed, row)) == [level, "OK"]
    assert levels(rates("GPU 0", Speed(1e12, 1e11), None)) == ["OK", "OK"]


def test_a_slow_rank_is_named_with_its_host():
    ranks = [(rank, f"n{rank // 2}", (100.0 + rank, 50.0)) for rank in range(8)]
    assert levels(outliers(ranks)) == ["OK"]
    ranks[5] = (5, "n2", (60.0, 42.0))
    lame, slow = outliers(ranks)
    assert (lame.level, lame.host, lame.found) == ("FAIL", "n2", "rank 5: matmul at 59% of the median of 8 ranks")
    assert slow.level == "WARN"
    assert "--exclude=n2" in lame.remedy


# -------------------------------------------------------------------------------------------------------------- report
def test_equal_findings_of_several_machines_are_one_line():
    text = page(
        [Finding("disk", "OK", "fine", host=f"n{i}") for i in range(9)] + [Finding("port", "FAIL", "x", "do", "n3")]
    )
    assert text.splitlines() == [
        "OK    disk  fine  [n0, n1, n2, n3, n4, n5 and 3 more]",
        "FAIL  port  x  [n3]",
        "            remedy: do",
        "",
        "1 FAIL, 0 WARN, 9 OK",
    ]


def test_json_says_the_worst_and_every_finding():
    findings = [Finding("a", "OK", "1"), Finding("b", "WARN", "2", "c")]
    assert worst(findings) == "WARN"
    assert json.loads(as_json(findings))["worst"] == "WARN"
    assert [finding["check"] for finding in json.loads(as_json(findings))["findings"]] == ["a", "b"]


@pytest.mark.slow
def test_the_command_finds_everything_that_is_wrong_at_once_and_ends_with_7(segment, tmp_path):
    """A disk that takes no more, a taken port, a name that is none, a missing shared object, a stale segment: five remedies."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sentencepiece.py").write_text("import ctypes\nctypes.CDLL('libnot-here.so.3')\n")
    with socket.socket() as holder:
        holder.bind(("", 0))
        holder.listen()
        options = ["--disk", str(tmp_path), "--port", str(holder.getsockname()[1]), "--host", "no-such.invalid"]
        command = [sys.executable, "-m", "ssa_megatron", "doctor", "--json", *options]
        done = subprocess.run(
            ["bash", "-c", 'ulimit -f 1000; exec "$@"', "bash", *command],  # every file ends at a megabyte
            env=launch.environment(PYTHONPATH=f"{broken}:{launch.MODULES}"),
            capture_output=True,
            text=True,
            timeout=200,
            cwd=launch.ROOT,
        )
    assert done.returncode == 7, done.stderr
    failed = {
        finding["check"]: finding for finding in json.loads(done.stdout)["findings"] if finding["level"] == "FAIL"
    }
    assert {"libraries", f"disk {tmp_path}", "shared memory", "names", "port"} <= failed.keys()
    assert all(finding["remedy"] for finding in failed.values())
    assert "File too large" in failed[f"disk {tmp_path}"]["found"]
    assert str(segment) in failed["shared memory"]["remedy"]


@pytest.mark.slow
def test_the_command_over_two_ranks_looks_at_machine_store_clocks_and_all_reduce():
    output = launch.run(2, "ssa_megatron", "doctor", "--cluster", "--json", "--need-gib", "0", timeout=300, expect=None)
    found = json.loads(output[output.index("{") : output.rindex("}") + 1])
    checks = {finding["check"] for finding in found["findings"]}
    assert {"rendezvous", "versions", "libraries", "speed", "store", "clocks", "all-reduce"} <= checks
    assert {finding["level"] for finding in found["findings"] if finding["check"] in ("rendezvous", "all-reduce")} == {
        "OK"
    }


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_named():
    variables = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "ssa_megatron", "doctor", "--cluster", "--timeout", "2"]
    environment = launch.environment() | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=launch.ROOT)
    assert done.returncode == 7
    assert "3 processes did not meet at 127.0.0.1:" in done.stdout
    assert "no sign of rank(s) 1, 2" in done.stdout


def test_a_cluster_of_nobody_is_refused():
    command = [sys.executable, "-m", "ssa_megatron", "doctor", "--cluster"]
    done = subprocess.run(
        command, env=launch.environment(), capture_output=True, text=True, timeout=120, cwd=launch.ROOT
    )
    assert done.returncode == 2
    assert "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not set" in done.stderr


def test_a_batch_script_is_no_step_and_is_told_to_use_srun(monkeypatch):
    """Regression: a KeyError: a batch script has SLURM_PROCID, and of the tasks' number nothing that can be relied on."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PROCID": "0", "LOCALID": "0", "JOB_ID": "7", "JOB_NODELIST": "n1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with raises(ConfigError, "cluster-not-launched", "WORLD_SIZE", "srun"):
        ranks.find()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it completes them
    ranks.find()
    found = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["0", "2", "n1", "20007"]


@pytest.mark.parametrize("job", ["0", "7", "10007", "19999", "4000000000"])
def test_the_port_under_srun_is_none_that_a_connection_may_have_been_given_nor_a_launchs(monkeypatch, job):
    environment = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": job, "SLURM_STEP_NODELIST": "n1"}
    monkeypatch.setattr(os, "environ", {**environment, "SLURM_STEP_NUM_TASKS": "1", "PATH": "/nowhere"})
    ranks.find()
    assert 10000 <= int(os.environ["MASTER_PORT"]) < 30000
    assert int(os.environ["MASTER_PORT"]) != 10000 + int(job) % 20000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
