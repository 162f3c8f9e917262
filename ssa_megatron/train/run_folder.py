"""The run folder: one owner, one recipe, everything a run leaves.

`claim` is called by every rank and decided by the writer: a folder in use, or begun with another recipe, is refused on all of
them with the difference named. Ownership is a lock that dies with its process, so a killed run never blocks the next.
Imports no torch: `ssa plan` asks it too.
"""

import fcntl
import json
import os
import platform
import socket
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import yaml

from ssa_megatron.config import Recipe, digest, dump_recipe
from ssa_megatron.config.recipe import differences, resolve
from ssa_megatron.errors import ConfigError, RunFolderError
from ssa_megatron.files import replace_durably

if TYPE_CHECKING:
    from ssa_megatron.parallel.state import ParallelState

LEASE_SECONDS = 120  # NFSv4 keeps the locks of a client that vanished for 90 s


class RunFolder:
    """Paths of a claimed run; the writer rank holds the lock until the process ends."""

    def __init__(self, path: Path):
        self.path = path
        self._lock: TextIO | None = None

    def lock(self) -> None:
        """Take ownership, or raise RunFolderError naming the owner."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = (self.path / "owner.lock").open("a+")
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.path} cannot be made or written: {error.strerror}",
                remedy="give another folder with --run-folder",
                id="run-folder-not-written",
            ) from None
        job = os.environ.get("SLURM_JOB_ID")
        deadline = time.monotonic() + LEASE_SECONDS
        while not self._acquire(handle):
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            # A job that was requeued meets the lock of its own earlier life, which a network file system keeps for a dead node
            # until its lease ends. Any other owner may be alive.
            if job is None or not owner.endswith(f"in SLURM job {job}") or time.monotonic() > deadline:
                raise RunFolderError(
                    f"run folder {self.path} is in use by {owner}",
                    remedy="stop that job, or give another folder with --run-folder",
                    id="run-folder-in-use",
                )
            time.sleep(1)
        handle.truncate(0)
        where = f" in SLURM job {job}" if job else ""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        handle.write(f"process {os.getpid()} on {socket.gethostname()} since {since}{where}\n")
        handle.flush()
        self._lock = handle

    def _acquire(self, handle) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.path} cannot be locked: {error.strerror}",
                remedy="its file system offers no flock: mount it with locks (Lustre: -o flock), or give another folder",
                id="run-folder-not-locked",
            ) from None
        return True

    def record(self, recipe: Recipe, tokenizer: dict[str, bytes], ds_config: dict, parallel: "ParallelState") -> None:
        """Write down what is about to run, once nothing can refuse it any more; the tokenizer's files when there are none."""
        for name, content in {
            "config.yaml": dump_recipe(recipe),
            "environment.json": json.dumps(_environment(parallel), indent=1),
            "ds_config.json": json.dumps(ds_config, indent=1),
        }.items():
            replace_durably(self.path / name, content)
        for name, data in tokenizer.items():
            if not (self.path / name).exists():
                (self.path / ".tmp-tokenizer").write_bytes(data)
                (self.path / ".tmp-tokenizer").rename(self.path / name)


def claim(path: Path, recipe: Recipe, parallel: "ParallelState") -> RunFolder:
    """Own `path` for `recipe`, which must be the one it was begun with. Raises RunFolderError, on every rank."""
    folder = RunFolder(path)

    def take() -> None:
        folder.lock()
        check_same_run(path, recipe)

    parallel.run_on_rank0(take)
    return folder


def read_recipe(path: Path) -> Recipe:
    """The resolved recipe of a run. Raises RunFolderError when `path` is not a run folder."""
    config = path / "config.yaml"
    try:
        return resolve(yaml.safe_load(config.read_text()), origin=str(config))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunFolderError(
            f"{path} is not a run folder: {config} cannot be read ({error})",
            remedy="check the path",
            id="config-yaml-unreadable",
        ) from None
    except ConfigError as error:
        raise RunFolderError(
            f"{config} is damaged, or of another release:\n{error.problem}",
            remedy="restore it from a copy, or give another folder",
            id="config-yaml-damaged",
        ) from None


def check_same_run(path: Path, recipe: Recipe) -> None:
    """Raise RunFolderError naming what differs if `path` holds a run of another recipe."""
    if not (path / "config.yaml").exists():
        return
    earlier = read_recipe(path)
    if digest(earlier) != digest(recipe):
        changed = "\n  ".join(differences(earlier.model_dump(), recipe.model_dump()))
        raise RunFolderError(
            f"run folder {path} belongs to another recipe:\n  {changed}",
            remedy="give another folder with --run-folder, or put the values above back",
            id="run-of-another-recipe",
        )


def _environment(parallel: "ParallelState") -> dict:
    from ssa_megatron.parallel.device import gpu_name

    packages = ("torch", "triton", "megatron-core", "deepspeed", "mosaicml-streaming", "sentencepiece", "transformers")
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
        "world": parallel.world_size,
        "device": str(parallel.device),
        "gpu": gpu_name(),
    }
