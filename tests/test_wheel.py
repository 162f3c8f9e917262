"""The wheel in a clean environment that has Hugging Face's `kernels` already: it works, and it leaves theirs alone.

Each Python that is on PATH gets an environment of its own (about 3 GB; torch is installed first, so that an index of CPU builds
serves it). Nothing is installed into the environment that runs this test.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.launch import ROOT

PACKAGES = {"ssa_megatron", "ssa_kernels", "ssa_pipelines", "ssa_cluster"}
NEEDED = {
    "ssa_cluster/assets/job.sh",
    "ssa_cluster/assets/networks.yaml",
    "ssa_cluster/assets/site.yaml",
    "ssa_cluster/assets/templates/nodes.sbatch",
    "ssa_megatron/config/recipes/demo.yaml",
    "ssa_megatron/evaluation/page.css",
    "ssa_megatron/planning/measured-h100.jsonl",
    "ssa_megatron/report/page.css",
    "ssa_torchvision_guard.pth",
    "ssa_torchvision_guard.py",
    *(f"{package}/py.typed" for package in PACKAGES),
}
KERNELS = "kernels==0.9.0"  # Hugging Face's, the newest that transformers 4.57.6 allows
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def run(command: list[object], *, folder: Path, expect: int = 0, timeout: float = 600) -> str:
    """The output of a command that sees neither this checkout nor this environment."""
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    settings = {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=keep | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT], folder=folder)
    [path] = folder.glob("*.whl")
    return path


def interpreter(version: str) -> str:
    """The Python of this version; skipped where there is none."""
    if sys.version.startswith(f"{version}."):
        return str(getattr(sys, "_base_executable", sys.executable))
    try:
        found = subprocess.run([f"python{version}", "-V"], capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        found = None
    if found is None or found.returncode:
        pytest.skip(f"NOT INSTALLED ON PYTHON {version}: put a python{version} on PATH, then make test-slow")
    return f"python{version}"


@pytest.fixture(scope="module", params=["3.11", "3.12"])
def python(request, wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with Hugging Face's `kernels`, then our wheel and what it requires."""
    folder = tmp_path_factory.mktemp("environment")
    run([interpreter(request.param), "-m", "venv", folder / "venv"], folder=folder)
    found = folder / "venv" / "bin" / "python"
    for what in ("torch==2.13.0", KERNELS, wheel):
        run([found, "-m", "pip", "install", "--quiet", what], folder=folder, timeout=1800)
    run([found, "-m", "pip", "check"], folder=folder)
    return found


def test_the_wheel_holds_four_packages_and_their_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert names >= NEEDED
    top = {name.partition("/")[0] for name in names if ".dist-info/" not in name}
    assert top == PACKAGES | {"ssa_torchvision_guard.pth", "ssa_torchvision_guard.py"}


def test_its_commands_work_and_those_of_a_cluster_find_their_files(python, tmp_path):
    run([python.parent / "ssa", "--help"], folder=tmp_path)
    run([python, "-m", "ssa_cluster.launch", "--help"], folder=tmp_path)
    code = (
        "from ssa_cluster.submission import *; print(*TEMPLATES, *read_site(CLUSTER / 'site.yaml'), *read_networks())"
    )
    assert {"nodes", "gpus_per_node", "infiniband"} <= set(run([python, "-c", code], folder=tmp_path).split())
    code = "from ssa_megatron.doctor.machine import versions; print(versions())"
    found = run([python, "-c", code], folder=tmp_path)
    assert "as required" in found
    assert "WARN" not in found
    assert "FAIL" not in found


def test_both_packages_of_kernels_are_imported(python, tmp_path):
    code = "from ssa_kernels import ssa_attention; from kernels import get_kernel; print(ssa_attention, get_kernel)"
    run([python, "-W", "ignore", "-c", code], folder=tmp_path)


def test_the_demo_runs(python, tmp_path):
    output = run([python.parent / "ssa", "demo", "--out", tmp_path / "demo"], folder=tmp_path, timeout=1800)
    assert "0x1.275d40f0b4876p+2" in output
    assert "2da3029fc9328eaf" in output


def test_uninstalled_it_leaves_the_other_kernels_working(python, tmp_path):
    """The last test of this environment: it takes the project out of it."""
    run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "ssa-megatron"], folder=tmp_path)
    run([python, "-c", "from kernels import get_kernel"], folder=tmp_path)
    run([python, "-c", "import ssa_kernels"], folder=tmp_path, expect=1)
    left = [path.name for path in (python.parents[1] / "lib").glob("*/site-packages/ssa_*")]
    assert left == []
