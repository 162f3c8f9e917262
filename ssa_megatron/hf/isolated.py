"""Runs an exported folder in a process that can import torch, transformers and what those two require, only.

It is the proof that a folder stands alone: the child starts with `-I -S` (no site packages, no .pth files, no PYTHON*
variables, not the working directory) and its only path finder returns nothing for any other top-level name, so
importing this project, `sentencepiece`, `deepspeed` or `megatron` there is an ImportError. It refuses to run without
torch and transformers.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder
from pathlib import Path

NEVER = frozenset(
    (
        "ssa_megatron",
        "ssa_kernels",
        "ssa_pipelines",
        "ssa_cluster",
        "sentencepiece",
        "deepspeed",
        "megatron",
        "streaming",
    )
)
"""Refused even should a future transformers require a package of that name."""


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


# ---------------------------------------------------------------------------------------------------------- the parent
def requirements_of(*names: str) -> dict[str, set[str]]:
    """Distributions that `names` require, transitively, without extras, each with the top-level modules it installs."""
    found: dict[str, set[str]] = {}
    waiting = list(names)
    while waiting:
        name = normalised(waiting.pop())
        if name in found:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # required on another platform only
        found[name] = {file.parts[0].partition(".")[0] for file in distribution.files or () if file.parts[0] != ".."}
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                waiting.append(re.match(r"[A-Za-z0-9._-]+", requirement)[0])
    return found


def run_isolated(job: dict, *, timeout_s: float = 600.0) -> dict:
    """Run a job in a bare process and return its answer.

    `job`: `folder`; `generate`: list of keyword arguments of `bare.generate_texts` (`prompts`, `mode`, ...);
    `documents`: lists of token ids; `perplexity`: list of keyword arguments of `bare.score_documents` (`mode`,
    `block_count`); `pipeline`: prompts for transformers' own text-generation pipeline. The answer has `generated`,
    `perplexity` (each request with its result), `pipeline` (texts, greedy), `torch`, `transformers`, and `imported`: the
    top-level modules from outside the standard library that the process ended up with. Raises EnvironmentProblem if it
    fails.
    """
    from ssa_megatron.errors import EnvironmentProblem  # here: as a script this file must not touch the project

    required = requirements_of("torch", "transformers")
    if not {"torch", "transformers"} <= required.keys():
        raise EnvironmentProblem(
            "torch and transformers are not both installed", remedy="run `make setup`", id="libraries-missing"
        )
    allowed = set().union(*required.values()) - NEVER | {"transformers_modules"}
    origins = [importlib.util.find_spec(name) for name in allowed - {"transformers_modules"} if name.isidentifier()]
    homes = {
        str(Path(spec.origin).parent.parent)
        for spec in origins
        if spec and spec.submodule_search_locations and spec.origin
    }
    message = {
        "folder": str(Path(job["folder"]).resolve()),
        "allowed": sorted(allowed),
        "distributions": sorted(required),
        "path": [
            entry
            for entry in dict.fromkeys(sys.path)
            if str(Path(entry).resolve()) in {str(Path(h).resolve()) for h in homes}
        ],
        "code": str(Path(__file__).with_name("bare.py")),
    }
    with tempfile.TemporaryDirectory(prefix="ssa-isolated-") as home:
        kept = ("PATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TMPDIR", "LANG", "LC_ALL")
        environment = {key: os.environ[key] for key in kept if key in os.environ}
        environment |= {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-B", __file__],
                input=json.dumps({**message, "job": {**job, "folder": message["folder"]}}),
                capture_output=True,
                text=True,
                encoding="utf-8",
                env=environment,
                cwd=home,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired:
            raise EnvironmentProblem(
                f"the isolated process took longer than {timeout_s:.0f} s", id="isolated-timeout"
            ) from None
    if done.returncode:
        last = done.stderr.strip().splitlines()[-12:]
        raise EnvironmentProblem("the isolated process failed:\n    " + "\n    ".join(last), id="isolated-failed")
    return json.loads(done.stdout)


# ----------------------------------------------------------------------------------------------------------- the child
class Barrier:
    """The child's only path finder: the standard library, the allowed top-level names, and nothing else.

    What is refused looks not installed (`find_spec` gives None, `import` raises ModuleNotFoundError): transformers asks
    for dozens of optional packages that way.
    """

    def __init__(self, standard_library: list[str], allowed: list[str], distributions: list[str]):
        self.standard_library, self.allowed = standard_library, frozenset(allowed)
        self.distributions = frozenset(distributions)

    def find_spec(self, name, path=None, target=None):
        if path is not None:  # a submodule of something already let in
            return PathFinder.find_spec(name, path, target)
        if name in NEVER:
            return None
        inside = PathFinder.find_spec(name, self.standard_library, target)
        if inside is None and name in self.allowed:
            return PathFinder.find_spec(name, None, target)
        return inside

    def find_distributions(self, *args, **kwargs):
        for distribution in PathFinder.find_distributions(*args, **kwargs):
            if normalised(distribution.name) in self.distributions:
                yield distribution

    def invalidate_caches(self):
        PathFinder.invalidate_caches()


def raise_barrier(path: list[str], allowed: list[str], distributions: list[str]) -> None:
    """From here on this process imports the standard library and `allowed` only."""
    sys.meta_path[:] = [BuiltinImporter, FrozenImporter, Barrier(list(sys.path), allowed, distributions)]
    sys.path.extend(path)


def main() -> None:
    message = json.loads(sys.stdin.buffer.read().decode("utf-8"))
    # the directory of a script is not on the path under -I; drop it all the same, it is the project's
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not mix with the answer
    standard = set(sys.modules)
    raise_barrier(message["path"], message["allowed"], message["distributions"])
    job = message["job"]
    if "probe" in job:  # names to try to import, for the tests of the barrier itself
        print(json.dumps({name: try_import(name) for name in job["probe"]}), file=answers)
        return
    spec = importlib.util.spec_from_file_location("bare", message["code"])
    bare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bare)
    answer = bare.run_job(job)
    tops = {name.partition(".")[0] for name in set(sys.modules) - standard}
    answer["imported"] = sorted(tops & set(message["allowed"]))
    print(json.dumps(answer), file=answers)


def try_import(name: str) -> str:
    try:
        importlib.import_module(name)
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return "imported"


if __name__ == "__main__":
    main()
