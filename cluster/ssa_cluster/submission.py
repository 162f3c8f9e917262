"""Submits a run to SLURM: plan, snapshot, render, sbatch, and where to look. A recipe that cannot run never gets a job number.

    cluster/submit --nodes 8 ssa-8b data.path=/shared/data --run-folder /shared/runs/first

The run folder receives code/HASH (this code and the resolved recipe, which the job runs from, so that editing the checkout
changes no running job), jobs/NAME.sbatch and logs/. Given again for the same run folder, it continues the run. It refuses what
`ssa plan` refuses, on any number of nodes the job may get, a run folder of another recipe, data that is not there, and a site
file that cannot be meant.
"""

import argparse
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from ssa_cluster.errors import Refused
from ssa_cluster.site_settings import CLUSTER, check_time, read_networks, read_site

PACKAGES = ("ssa_megatron", "ssa_kernels", "ssa_pipelines", "ssa_cluster")
TEMPLATES = tuple(sorted(path.stem for path in (CLUSTER / "templates").glob("*.sbatch")))
WARNING = 60  # seconds: SLURM may send --signal up to a minute before or after the time it was asked for


def main(arguments: list[str] | None = None) -> int:
    """Submit; returns the exit code: 0, or 2 with a message on stderr."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        _submit(options)
    except Refused as reason:
        print(f"error[{reason.id}]: {reason}", file=sys.stderr)
        return 2
    except OSError as problem:
        print(
            f"error[run-folder-not-written]: --run-folder {options.run_folder} cannot be made or written: {problem}",
            file=sys.stderr,
        )
        return 2
    return 0


def _submit(options: argparse.Namespace) -> None:
    site, network = read_site(options.site), read_networks()
    if site["network"] not in network.keys() - {"all"}:
        known = ", ".join(sorted(network.keys() - {"all"}))
        raise Refused(f"{options.site}: network: {site['network']!r} is not one of {known}", id="unknown-network")
    if options.template in ("pyxis", "apptainer") and not site["image"]:
        raise Refused(f"template {options.template} needs `image` in {options.site}", id="no-image")
    run = Path(os.path.abspath(options.run_folder))
    if found := re.search(r"""[\s"'$`\\%#,:]""", str(run)):  # it stands in #SBATCH lines, where nothing can be quoted
        raise Refused(
            f"--run-folder {run} has {found[0]!r} in it: no blanks, quotes, $, %, #, commas, colons or backslashes, "
            "which SLURM's #SBATCH lines or a container's mounts read as something else",
            id="run-folder-characters",
        )
    recipe = _resolve(options.recipe, options.overrides)
    sweep = _read_sweep(options.sweep) if options.template == "array" else [""]
    fewest, most = options.nodes
    for task, line in enumerate(sweep):
        folder = run / str(task) if options.template == "array" else run
        for nodes in range(fewest, most + 1):
            _plan(recipe, line, nodes * site["ranks_per_node"], site["gpu"], folder)
    for line in sweep:
        _check_data(recipe, line, on_nodes=options.data_on_nodes)
    mounts = _mounts(site, run, recipe)
    if options.template in ("pyxis", "apptainer") and (wrong := [path for path in mounts if re.search('[,:"`]', path)]):
        problem = f"a container cannot mount {wrong[0]}: no commas, colons or quotes in the path of data"
        raise Refused(problem, id="data-path-characters")
    limit = options.time or site["time"]
    check_time(limit, least=site["grace"] + 2 * WARNING, origin="--time" if options.time else f"{options.site}: time")
    code = _snapshot(run, recipe, sweep)
    values = {
        "name": run.name,
        "nodes": str(most) if fewest == most else f"{fewest}-{most}",
        "cpus": str(site["cpus_per_node"]),
        "time": limit,
        "warning": str(site["grace"] + WARNING),
        "grace": str(site["grace"]),
        "join": str(site["join"]),
        "ranks": str(site["ranks_per_node"]),
        "python": site["python"],
        "run": str(run),
        "code": str(code),
        "last": str(len(sweep) - 1),
        "image": site["image"],
        "mounts": ",".join(f"{path}:{path}" for path in mounts),
    }
    extra = [f"--gpus-per-node={site['gpus_per_node']}"] * (site["gpus_per_node"] > 0) + site["sbatch"]
    script = run / "jobs" / f"{options.template}.sbatch"
    text = render(options.template, values, site=extra, environment=_environment(site, network, code))
    for folder in (script.parent, run / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    script.write_text(text)
    print(f"code and recipe  {code}\njob script       {script}")
    if options.dry_run:
        print(f"not submitted; sbatch {script} does it")
        return
    try:
        command = ["sbatch", "--parsable", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=_handed_on(os.environ))
    except FileNotFoundError:
        raise Refused(
            "no sbatch on this machine: submit from a login node, or start with python -m ssa_cluster.launch",
            id="no-sbatch",
        ) from None
    except subprocess.TimeoutExpired:
        raise Refused(
            "sbatch has not answered for 120 s: check squeue for the job, then sinfo and scontrol ping",
            id="sbatch-timeout",
        ) from None
    if done.returncode:
        raise Refused(f"sbatch failed: {done.stderr.strip()}", id="sbatch-failed")
    job = done.stdout.strip().partition(";")[0]
    print(
        f"job              {job}\n"
        f"log              {run}/logs/{job}{'_TASK' * (options.template == 'array')}.log\n"
        f"state            squeue --job {job}\n"
        f"steps and losses ssa status {run} --watch\n"
        f"stop, continuing scancel --batch --signal=USR1 {job}\n"
        f"stop for good    scancel {job}"
    )


def render(template: str, values: dict[str, str], *, site: list[str], environment: list[str]) -> str:
    """A job script: `{{name}}` becomes values[name]; `#SBATCH {{site}}` and `# {{environment}}` become lines."""
    blocks = {"#SBATCH {{site}}": [f"#SBATCH {option}" for option in site], "# {{environment}}": environment}
    lines = []
    for line in (CLUSTER / "templates" / f"{template}.sbatch").read_text().splitlines():
        lines += blocks[line] if line in blocks else [re.sub(r"\{\{(\w+)\}\}", lambda m: values[m[1]], line)]
    return "\n".join(lines) + "\n"


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("cluster/submit", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("recipe", help="a packaged recipe or a YAML file")
    parser.add_argument("overrides", nargs="*", help="section.field=value")
    parser.add_argument("--run-folder", required=True, help="on a disk that all nodes share; made, or continued")
    parser.add_argument("--nodes", default="1", help="N, or MIN-MAX: as many as SLURM has; every number must be legal")
    parser.add_argument("--template", choices=TEMPLATES, help="single for one node, nodes for several, by default")
    parser.add_argument("--sweep", type=Path, help="for the array template: a file with overrides, one task a line")
    parser.add_argument("--site", type=Path, default=CLUSTER / "site.yaml", help="cluster/site.yaml by default")
    parser.add_argument("--time", help="time limit of one life of the job; the site's by default")
    parser.add_argument("--data-on-nodes", action="store_true", help="local data is not looked for on this machine")
    parser.add_argument("--dry-run", action="store_true", help="do everything but submit")
    found = parser.parse_intermixed_args(arguments)
    nodes = re.fullmatch(r"(\d+)(?:-(\d+))?", found.nodes)
    if not nodes or not 0 < int(nodes[1]) <= int(nodes[2] or nodes[1]):
        parser.error(f"--nodes {found.nodes} is neither N nor MIN-MAX with 0 < MIN <= MAX")
    found.nodes = (int(nodes[1]), int(nodes[2] or nodes[1]))
    found.template = found.template or ("array" if found.sweep else "single" if found.nodes == (1, 1) else "nodes")
    if (found.template == "array") != bool(found.sweep):
        parser.error("the array template and --sweep FILE go together")
    if found.template in ("single", "array") and found.nodes != (1, 1):
        parser.error(f"template {found.template} is for one node; --template nodes, or --nodes 1")
    return found


def _ssa(*arguments: str) -> str:
    command = [sys.executable, "-m", "ssa_megatron", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, "LOCAL_RANK": "0"}, timeout=300, check=False
        )
    except subprocess.TimeoutExpired:
        raise Refused(f"`ssa {shlex.join(arguments)}` has not answered for 300 s", id="ssa-timeout") from None
    if "ModuleNotFoundError" in done.stderr:
        last = done.stderr.strip().splitlines()[-1]
        raise Refused(
            f"{sys.executable} cannot run ssa ({last}): activate the environment of requirements.txt, "
            "or PYTHON=/path/to/its/python cluster/submit ...",
            id="ssa-not-installed",
        )
    if done.returncode:
        problem = f"`ssa {shlex.join(arguments)}` refuses:\n{done.stdout[-2000:]}{done.stderr.strip()}"
        raise Refused(problem, id="ssa-refused")
    return done.stdout


def _resolve(recipe: str, overrides: list[str]) -> dict:
    """The whole recipe, its local paths absolute: the job runs from another folder."""
    values = yaml.safe_load(_ssa("config", recipe, *overrides))
    data = values["data"]
    for holder, key in ((data, "path"), (data, "cache"), *((data["sources"], name) for name in data["sources"])):
        if holder[key] and "://" not in holder[key]:
            holder[key] = os.path.abspath(holder[key])
    return values


def _plan(recipe: dict, line: str, world: int, gpu: str, run: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ssa-submit-") as folder:
        draft = Path(folder) / "recipe.yaml"
        draft.write_text(yaml.safe_dump(recipe, sort_keys=False))
        options = ("--world", str(world), "--gpu", gpu, "--top", "0", "--run-folder", str(run))
        page = _ssa("plan", str(draft), *shlex.split(line), *options)
    head = page.splitlines()[:2]
    print("\n".join(([f"sweep: {line}"] if line else []) + head))


def _check_data(recipe: dict, line: str, *, on_nodes: bool) -> None:
    """The recipe names data, and local data is there: a job that waited a day for its nodes is late to find out."""
    words = dict(word.split("=", 1) for word in line.split())
    changed = {key: value for key, value in words.items() if re.fullmatch(r"data\.(path|cache|sources\..*)", key)}
    for key, value in changed.items():
        if "://" not in value and not os.path.isabs(value):  # the job runs from another folder
            problem = f"sweep: {line}: {key} must be an absolute path or an address, not {value}"
            raise Refused(problem, id="sweep-relative-path")
    data = recipe["data"]
    named = {"data.path": data["path"], **{f"data.sources.{name}": path for name, path in data["sources"].items()}}
    named |= {key: value for key, value in changed.items() if key != "data.cache"}
    named = {key: value for key, value in named.items() if value}
    if not named:
        raise Refused("the recipe names no data: give data.path=FOLDER, as `ssa data prepare` made it", id="no-data")
    for key, value in named.items():
        if not on_nodes and "://" not in value and not os.path.isdir(value):
            raise Refused(
                f"{key}={value} is not a folder on this machine; check the path, or --data-on-nodes if only the nodes see it",
                id="data-missing",
            )


def _read_sweep(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise Refused(f"--sweep {path} cannot be read: {error}", id="sweep-unreadable") from None
    lines = [line for line in lines if line and not line.startswith("#")]
    for line in lines:
        for word in line.split():
            if not re.fullmatch(r"[\w.]+=[^\s'\"\\]+", word):
                raise Refused(
                    f"--sweep {path}: {word!r} in {line!r} is not section.field=value without blanks or quotes",
                    id="sweep-override",
                )
    if not lines:
        raise Refused(f"--sweep {path} has no line", id="sweep-empty")
    return lines


def _snapshot(run: Path, recipe: dict, sweep: list[str]) -> Path:
    """Code and recipe under a name made of their content: a second submission of the same is the same folder."""
    files = {"recipe.yaml": yaml.safe_dump(recipe, sort_keys=False).encode()}
    if sweep != [""]:
        files["sweep.txt"] = "".join(f"{line}\n" for line in sweep).encode()
    for package in PACKAGES:
        folder = _folder(package)
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[str(path.relative_to(folder.parent))] = path.read_bytes()
    files["cluster/job.sh"] = (CLUSTER / "job.sh").read_bytes()
    digest = hashlib.sha256()
    for name, content in sorted(files.items()):
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    code = run / "code" / digest.hexdigest()[:16]
    if code.exists():
        return code
    draft = code.with_name(f".tmp-{code.name}-{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    for name, content in files.items():
        (draft / name).parent.mkdir(parents=True, exist_ok=True)
        (draft / name).write_bytes(content)
    draft.rename(code)
    return code


def _folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        problem = f"{sys.executable} has no package {package}: install this project, all of it"
        raise Refused(problem, id="package-not-installed")
    return Path(spec.origin).parent


def _environment(site: dict, networks: dict, code: Path) -> list[str]:
    lines = []
    if site["setup"]:  # whatever it does to the shell, the job goes on as the template began
        lines = ["set +u # conda's and modules' own scripts read variables that nobody has set", *site["setup"]]
        lines += ["set +e -u", f'cd "{code}" || exit 7']
    for section in ("all", site["network"]):
        for name, (value, reason) in networks[section].items():
            lines.append(f'export {name}="${{{name}:-{value}}}"  # {reason}')
    return lines


def _handed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that sbatch hands to the job: the caller's, without this checkout and without a job around the caller.

    SLURM_CPU_BIND, SLURM_MEM_PER_CPU, SLURM_NTASKS... of an interactive job are orders to the new job's srun, for cores and tasks
    it does not have. The checkout on PYTHONPATH, where cluster/submit puts it, would stand in for what a snapshot lacks.
    """
    found = dict(environment)
    found.pop("PYTHONSAFEPATH", None)  # also set there; the job finds its snapshot by standing in it
    checkout = {"", str(CLUSTER.parent), *(str(CLUSTER.parent / name) for name in ("kernels", "pipelines", "cluster"))}
    paths = [path for path in found.pop("PYTHONPATH", "").split(os.pathsep) if path not in checkout]
    if paths:
        found["PYTHONPATH"] = os.pathsep.join(paths)
    if "SLURM_JOB_ID" in found:
        ours = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SSA_HOST"}
        kept = {"SLURM_CONF", "SLURM_CLUSTERS"}
        foreign = re.compile(r"(SLURM|SLURMD|PMI|PMIX)_")
        found = {k: v for k, v in found.items() if k in kept or not (k in ours or foreign.match(k))}
    return found


def _mounts(site: dict, run: Path, recipe: dict) -> list[str]:
    data = recipe["data"]
    local = [path for path in (data["path"], data["cache"], *data["sources"].values()) if path and "://" not in path]
    return list(dict.fromkeys([str(run), *local, *site["mounts"]]))


if __name__ == "__main__":
    sys.exit(main())
