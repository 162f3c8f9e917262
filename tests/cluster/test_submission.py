"""cluster/submit without a scheduler: what it refuses, what it renders, what it leaves in the run folder."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ssa_cluster.errors import Refused
from ssa_cluster.site_settings import SITE, check_time, read_networks, read_site
from ssa_cluster.submission import TEMPLATES, render
from ssa_cluster.submission import _parse as parse_submission
from ssa_cluster.submission import _submit as submit_here
from ssa_megatron.config import dump_recipe, load_recipe
from tests import launch
from tests.cluster.conftest import submit
from tests.errors import raises

CLUSTER = launch.ROOT / "cluster"
SHELL = [CLUSTER / "job.sh", CLUSTER / "submit", *(CLUSTER / "templates").glob("*.sbatch")]


def shellcheck(*paths: Path) -> str:
    """What shellcheck has to say; skipped where it is not installed."""
    try:
        done = subprocess.run(
            ["shellcheck", "--external-sources", *map(str, paths)],
            cwd=launch.ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
    except FileNotFoundError:
        pytest.skip("NO SHELL FILE WAS CHECKED: apt-get install shellcheck")
    return done.stdout


def test_every_shell_file_of_the_project_passes_shellcheck():
    others = [path for path in launch.ROOT.glob(".ci/*") if path.read_text().startswith("#!/usr/bin/env bash")]
    assert others
    assert shellcheck(*SHELL, *others) == ""


def test_the_shipped_site_file_has_every_setting():
    assert read_site(CLUSTER / "site.yaml").keys() == SITE.keys()
    assert read_site(CLUSTER / "site.yaml")["network"] in read_networks()


@pytest.mark.parametrize(
    ("key", "value", "id", "mention"),
    [
        ("partition", "gpu", "unknown-site-key", "'partition'"),
        ("grace", "180", "site-key-type", "'180'"),
        ("ranks_per_node", 0, "site-key-too-small", "at least 1, not 0"),
        ("sbatch", "--exclusive", "site-key-type", "'--exclusive'"),
        ("image", None, "site-key-type", "None"),
        ("time", 86400, "site-key-type", "24:00:00"),
        ("setup", [{"echo a": "b"}], "site-line-not-text", "{'echo a': 'b'}"),
        ("sbatch", [7], "site-line-not-text", "7"),
        ("sbatch", ["exclusive"], "not-an-sbatch-option", "'exclusive'"),
        ("sbatch", ["--comment=a\nrm x"], "not-an-sbatch-option", "comment"),
        ("image", 'a"; touch x; "', "site-key-quotes", "'\"' in 'a\"; touch x; \"'"),
        ("python", "py`thon`", "site-key-quotes", "'`'"),
        ("mounts", ["/scratch:/data"], "site-mount", "'/scratch:/data'"),
        ("mounts", [""], "site-mount", "''"),
        ("gpus_per_node", 4, "more-ranks-than-gpus", "8 ranks for 4 GPU(s)"),
    ],
)
def test_a_wrong_site_setting_is_named_with_its_value(tmp_path, key, value, id, mention):
    values = yaml.safe_load((CLUSTER / "site.yaml").read_text()) | {key: value}
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(values))
    with raises(Refused, id, key, mention):
        read_site(tmp_path / "site.yaml")


@pytest.mark.parametrize("option", ["--site", "--sweep"])
def test_a_file_that_is_not_text_is_refused_by_name(site, tmp_path, option):
    """Regression: a traceback."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    options = parse_submission([option, str(tmp_path / "binary"), "--run-folder", str(tmp_path / "run"), "demo"])
    with raises(Refused, f"{option.lstrip('-')}-unreadable", f"{option} {tmp_path}/binary", "utf-8"):
        submit_here(options)


@pytest.mark.parametrize("limit", ["5", "5:00", "0:05:00", "0-0:05", "0-0:05:00"])
def test_a_time_limit_in_which_nothing_could_be_trained_is_refused(limit):
    """Regression: such a job stopped as soon as it had begun and requeued itself for ever."""
    check_time(limit, least=300, origin="--time")
    with raises(Refused, "time-limit-too-short", f"--time: {limit}", "300 s", "301 s"):
        check_time(limit, least=301, origin="--time")


@pytest.mark.parametrize("limit", ["1-00", "2-12:00:00", "24:00:00", "1440", "UNLIMITED"])
def test_a_day_is_long_enough(limit):
    check_time(limit, least=86_400, origin="--time")


@pytest.mark.parametrize("limit", ["", "a day", "1:2:3:4", "24h", "-5"])
def test_what_slurm_takes_for_no_time_limit_is_refused(limit):
    with raises(Refused, "not-a-time-limit", repr(limit)):
        check_time(limit, least=1, origin="--time")


def test_a_missing_site_setting_is_named(tmp_path):
    (tmp_path / "site.yaml").write_text("python: python\n")
    with raises(Refused, "missing-site-key", "gpu", CLUSTER / "site.yaml"):
        read_site(tmp_path / "site.yaml")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_rendered_template_is_a_checked_shell_script_without_holes(template, tmp_path):
    values = dict.fromkeys(
        (
            "name",
            "nodes",
            "cpus",
            "time",
            "warning",
            "grace",
            "join",
            "ranks",
            "python",
            "run",
            "last",
            "image",
            "mounts",
        ),
        "7",
    )
    text = render(
        template, {**values, "code": str(launch.ROOT)}, site=["--gpus-per-node=8"], environment=['export A="1"  # why']
    )
    assert "{{" not in text
    assert "#SBATCH --gpus-per-node=8\n" in text
    assert 'export A="1"  # why\n' in text
    assert "#SBATCH --signal=B:USR1@7\n" in text
    assert "#SBATCH --requeue\n" in text
    path = tmp_path / "job.sbatch"
    path.write_text(text)
    assert shellcheck(path) == ""


def test_every_setting_of_a_network_has_a_reason():
    for section in read_networks().values():
        for name, (value, reason) in section.items():
            assert re.fullmatch(r"[A-Z_]+", name)
            assert isinstance(value, str)
            assert len(reason) > 20


def test_a_dry_run_leaves_code_recipe_and_script_and_submits_nothing(site, tmp_path):
    run = tmp_path / "run"
    arguments = ("--site", site, "--nodes", "1-2", "--dry-run", "--run-folder", run, "demo", "data.path=some/data")
    arguments += ("--data-on-nodes",)
    said = submit(*arguments)
    assert said.count("demo: 1,051,776 parameters") == 2  # one node, and two
    assert "not submitted" in said
    [code] = (run / "code").iterdir()
    script = (run / "jobs" / "nodes.sbatch").read_text()
    assert f'cd "{code}"' in script
    assert "#SBATCH --nodes=1-2\n" in script
    assert "#SBATCH --signal=B:USR1@100\n" in script  # grace 40 and SLURM's own minute
    assert "--gpus-per-node" not in script
    recipe = yaml.safe_load((code / "recipe.yaml").read_text())
    assert Path(recipe["data"]["path"]).is_absolute()
    assert (code / "ssa_megatron" / "cli.py").read_bytes() == (launch.ROOT / "ssa_megatron" / "cli.py").read_bytes()
    submit(*arguments)  # the same again is the same snapshot
    assert [*(run / "code").iterdir()] == [code]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--nodes", "3", "demo"), "train.global_batch_rows must be a multiple"),
        (("--nodes", "1-3", "demo"), "train.global_batch_rows must be a multiple"),
        (("--nodes", "2-1", "demo"), "--nodes 2-1 is neither N nor MIN-MAX"),
        (("demo", "train.stepz=3"), "train.stepz: unknown key; did you mean 'steps'?"),
        (("--template", "pyxis", "demo"), "error[no-image]"),
        (("--template", "array", "demo"), "the array template and --sweep FILE go together"),
        (("--template", "single", "--nodes", "2", "demo"), "template single is for one node"),
        (("demo",), "error[no-data]"),
        (("demo", "data.path=/no/such/data"), "error[data-missing]: data.path=/no/such/data"),
    ],
)
def test_what_cannot_run_gets_no_job_number(site, tmp_path, arguments, said):
    output = submit("--site", site, "--run-folder", tmp_path / "run", *arguments, expect=2)
    assert said in output
    assert not (tmp_path / "run" / "jobs").exists()


def test_time_is_refused_before_anything_is_made(site, tmp_path):
    said = submit("--site", site, "--run-folder", tmp_path / "run", "--time", "2", "demo", "data.path=/", expect=2)
    assert "error[time-limit-too-short]: --time: 2 is 120 s" in said
    assert not (tmp_path / "run").exists()


ODD = {  # legal, and hard on a shell
    "python": "$HOME/an environment/bin/python",
    "image": "docker://nvcr.io#nvidia/pytorch:25.01-py3",
    "mounts": ["/a folder", "$SCRATCH/x"],
    "sbatch": ["--comment=it's", "--exclude=n[1-3]"],
    "setup": ['echo "$NOBODY_HAS_SET_THIS"', "set -euo pipefail", "cd /", "export A='it is'"],
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_odd_settings_give_a_script_that_shellcheck_passes_and_that_starts_the_launcher(site, tmp_path, template):
    """Regression: a job's end: a setup with `set -e` or `cd`, or with scripts that `set -u` ends, as conda's."""
    odd = tmp_path / "odd.yaml"
    odd.write_text(yaml.safe_dump(yaml.safe_load(site.read_text()) | ODD))
    data, run = tmp_path / "its data", tmp_path / "run"
    data.mkdir()
    (tmp_path / "sweep.txt").write_text("optimizer.lr=0.001 train.seed=7\n")  # one task
    more = ("--sweep", tmp_path / "sweep.txt") if template == "array" else ("--template", template)
    submit("--site", odd, *more, "--run-folder", run, "--dry-run", "demo", f"data.path={data}")
    script = run / "jobs" / f"{template}.sbatch"
    assert shellcheck(script) == ""
    called = tmp_path / "called"
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text(f'#!/bin/bash\npwd >>"{called}"\nprintf "%s\\n" "$@" >>"{called}"\nexit 75\n')
    (tools / "scontrol").write_text("#!/bin/bash\necho n1\n")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_ARRAY_TASK_ID": "0", "HOME": "/home/me"}
    environment = launch.environment(PATH=f"{tools}:/usr/bin:/bin", SCRATCH="/scratch", **slurm)
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 75, done.stdout + done.stderr
    folder, *words = called.read_text().splitlines()
    [code] = (run / "code").iterdir()
    assert folder == str(code)
    at = words.index("/home/me/an environment/bin/python")
    assert words[at + 1 : at + 3] == ["-m", "ssa_cluster.launch"]
    task = ["optimizer.lr=0.001", "train.seed=7", "--run-folder", f"{run}/0"]
    end = task if template == "array" else ["--run-folder", str(run)]
    assert words[-len(end) - 2 :] == ["train", "recipe.yaml", *end]
    text = "\n".join(words)
    if template in ("pyxis", "apptainer"):
        assert ODD["image"] in text
        assert f"{data}:{data},/a folder:/a folder,/scratch/x:/scratch/x" in text


def test_a_container_cannot_mount_data_whose_path_has_a_colon(site, tmp_path):
    with_image = tmp_path / "site.yaml"
    with_image.write_text(yaml.safe_dump(yaml.safe_load(site.read_text()) | {"image": "x.sif"}))
    (tmp_path / "a:b").mkdir()
    options = ("--site", with_image, "--template", "apptainer", "--run-folder", tmp_path / "run")
    said = submit(*options, "demo", f"data.path={tmp_path / 'a:b'}", expect=2)
    assert "error[data-path-characters]" in said
    assert f"{tmp_path}/a:b" in said
    assert not (tmp_path / "run").exists()


def test_a_run_folder_of_another_recipe_gets_no_job_number(site, tmp_path):
    """Regression: the job found out after its time in the queue, with exit code 5; a sweep checks each task's folder."""
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("train.seed=1\ntrain.seed=2\n")
    (tmp_path / "run" / "1").mkdir(parents=True)
    (tmp_path / "run" / "1" / "config.yaml").write_text(dump_recipe(load_recipe("demo", ["train.seed=3"])))
    said = submit("--site", site, "--run-folder", tmp_path / "run", "--sweep", sweep, "demo", "data.path=/", expect=2)
    assert f"run folder {tmp_path}/run/1 belongs to another recipe:\n  " in said
    assert "train.seed: 3 -> 2" in said
    assert not (tmp_path / "run" / "jobs").exists()


def test_a_sweep_line_that_is_not_legal_is_refused_before_any_task_runs(site, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# learning rates\noptimizer.lr=0.001\noptimizer.lr=-1\n")
    said = submit("--site", site, "--run-folder", tmp_path / "run", "--sweep", sweep, "demo", expect=2)
    assert "sweep: optimizer.lr=0.001" in said
    assert "optimizer.lr: Input should be greater than 0 (got -1)" in said


def test_a_relative_path_in_a_sweep_is_refused_the_job_runs_from_another_folder(site, tmp_path):
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("data.path=some/data\n")
    said = submit("--site", site, "--run-folder", tmp_path / "run", "--sweep", sweep, "demo", expect=2)
    assert "error[sweep-relative-path]" in said
    assert "data.path" in said
    assert "some/data" in said


@pytest.mark.parametrize("name", ["my run", "run'", "run#1", "a,b", "a:b", "50%"])
def test_a_folder_that_sbatch_or_a_container_cannot_take_is_refused(site, tmp_path, name):
    options = parse_submission(["--site", str(site), "--run-folder", str(tmp_path / name), "demo"])
    with raises(Refused, "run-folder-characters", tmp_path / name):
        submit_here(options)


def test_a_run_folder_that_cannot_be_made_is_refused_with_the_reason(site, tmp_path):
    """Regression: a traceback."""
    (tmp_path / "file").touch()
    run = tmp_path / "file" / "run"
    said = submit("--site", site, "--run-folder", run, "demo", f"data.path={tmp_path}", "--dry-run", expect=2)
    assert f"error[run-folder-not-written]: --run-folder {run}" in said


@pytest.mark.parametrize("inside", [True, False])
def test_a_job_does_not_inherit_the_job_it_is_submitted_from_nor_the_checkout(site, tmp_path, inside):
    """Regression: srun in it got the interactive job's cores (`CPU binding outside of job step allocation`) and first node."""
    tools, seen = tmp_path / "tools", tmp_path / "seen"
    tools.mkdir()
    (tools / "sbatch").write_text(f'#!/bin/bash\nenv >"{seen}"\necho "4711;cluster"\n')
    (tools / "sbatch").chmod(0o755)
    around = {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_CONF": "/etc/s.conf", "SSA_HOST": "n9", "MINE": "kept"}
    around |= {"PATH": f"{tools}:/usr/bin:/bin", "PYTHONPATH": f"/my modules:{launch.MODULES}"}
    around |= {"SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n9", "WORLD_SIZE": "8"} if inside else {}
    arguments = ("--site", site, "--run-folder", tmp_path / "run", "demo", f"data.path={tmp_path}")
    said = submit(*arguments, environment={**launch.environment(), **around})
    assert "job              4711\n" in said
    found = dict(line.split("=", 1) for line in seen.read_text().splitlines() if "=" in line)
    assert (found["SLURM_CONF"], found["MINE"], found["PYTHONPATH"]) == ("/etc/s.conf", "kept", "/my modules")
    assert {"SLURM_CPU_BIND", "SSA_HOST"} & found.keys() == (set() if inside else {"SLURM_CPU_BIND", "SSA_HOST"})
    assert not {"SLURM_JOB_ID", "SLURMD_NODENAME", "WORLD_SIZE", "PYTHONSAFEPATH"} & found.keys()


def test_the_folder_it_is_called_from_is_not_searched_for_modules(site, tmp_path):
    """Regression: a folder named `ssa_cluster` there, or another checkout, was run and submitted in this one's place."""
    for name in ("ssa_cluster", "ssa_megatron"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    done = subprocess.run(
        [CLUSTER / "submit", "--site", site, "--run-folder", "run", "--dry-run", "demo", "data.path=."],
        env={**launch.environment(), "PYTHON": sys.executable},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [code] = (tmp_path / "run" / "code").iterdir()
    assert (code / "ssa_cluster" / "launch.py").read_bytes() == (CLUSTER / "ssa_cluster" / "launch.py").read_bytes()
    recipe = yaml.safe_load((code / "recipe.yaml").read_text())
    assert recipe["data"]["path"] == str(tmp_path)


def test_where_there_is_no_slurm_submit_says_what_to_do_instead(site, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "readlink"):
        (tools / tool).symlink_to(shutil.which(tool))
    arguments = ("--site", site, "--run-folder", tmp_path / "run", "demo", f"data.path={tmp_path}")
    said = submit(*arguments, environment=launch.environment(PATH=str(tools)), expect=2)
    assert "error[no-sbatch]" in said


def test_an_environment_without_the_requirements_is_named(site, tmp_path, monkeypatch):
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\")\n")
    environment = launch.environment(PYTHONPATH=str(tmp_path))
    said = submit("--site", site, "--run-folder", tmp_path / "run", "demo", environment=environment, expect=2)
    assert "error[ssa-not-installed]" in said
    assert "No module named 'typer'" in said


def test_every_failure_has_a_page_that_the_readme_links_and_begins_with_what_is_seen():
    pages = {path.name for path in (CLUSTER / "failures").iterdir()}
    assert set(re.findall(r"\(failures/([\w-]+\.md)\)", (CLUSTER / "README.md").read_text())) == pages
    for page in pages:
        text = (CLUSTER / "failures" / page).read_text()
        assert text.startswith("# ")
        assert set(re.findall(r"\]\(([\w-]+\.md)\)", text)) <= pages
