"""What commit 86b6824 left on disk still works: its runs continue, its datasets are read, its exported folders load.

tests/fixtures/make_fixture.py made the archive and its expected.json with a checkout of that commit. Everything here goes through
the command line or through transformers, so that modules may move. Losses and final weights are compared bit for bit where
torch, its build and the architecture are those of the making (in bf16 the vector units too), elsewhere within a tolerance.
"""

import hashlib
import importlib.util
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.timeout(600)  # seconds; a busy machine takes minutes to import the libraries

NAME = "made_at_86b6824"
ARCHIVE = Path(__file__).resolve().parents[1] / "fixtures" / f"{NAME}.tar.xz"
# Vector units of every x86-64 processor, so that another one computes the same bits; make_fixture.py sets the same.
ARITHMETIC = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "CUDA_VISIBLE_DEVICES": "",
}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3}  # relative, where the arithmetic is another one
LOGIT_TOLERANCE = 1e-5
# of attention.topk: the old spelling is accepted, the new one may be written
SPELLINGS = {"authors": ("authors", "reference")}
RENAMED = {"patience": "stall_timeout"}  # fields whose old name is still accepted

LOAD = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, prompt, new = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto").eval()
tokens = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(prompt, return_tensors="pt").input_ids
found = {"prompt": tokens[0].tolist(), "tokens": {}, "logits": {}}
for mode in ("full", "sparse"):
    with torch.inference_mode():
        text = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False, inference_mode=mode
        )
        logits = model(text, inference_mode=mode).logits[0]
    found["tokens"][mode] = text[0, tokens.shape[1] :].tolist()
    found["logits"][mode] = logits[::16, :8].tolist()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """The unpacked archive: the working directory of every command, as its recipes name their data relative to it."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ARCHIVE) as tar:
        tar.extractall(folder, filter="data")
    shutil.copytree(folder / NAME / "runs", folder / NAME / "continued")
    return folder / NAME


@pytest.fixture(scope="module")
def expected(old) -> dict:
    return json.loads((old / "expected.json").read_text())


@pytest.fixture(scope="module")
def outputs(old, expected) -> Iterator[Callable[[str], list[str]]]:
    """Gives what the commands of a name print. Those of the next name run at the same time."""
    todo, started = jobs(expected), {}
    with ThreadPoolExecutor(2) as pool:

        def result(name: str) -> list[str]:
            at = list(todo).index(name)
            for each in list(todo)[at : at + 2]:
                started[each] = started.get(each) or pool.submit(run, old, todo[each])
            return started[name].result()

        yield result


def jobs(expected: dict) -> dict[str, list[tuple]]:
    """Name -> commands that run one after the other, in the order in which the tests below ask for them."""
    found = {}
    for name, wanted in expected["runs"].items():
        found[f"continue {name}"] = [ssa(*wanted["command"][:-1], f"continued/{name}")]
    for name in ("psalms", "long"):
        found[f"verify {name}"] = [ssa("data", "verify", f"data/{name}")]
    found["ledger"] = [ssa("data", "ledger", "runs/nsa", "3")]
    for name in expected["runs"]:
        found[f"config {name}"] = [ssa("config", f"{p}.yaml") for p in (f"recipes/{name}", f"runs/{name}/config")]
    blocks = ("attention.block_size=16", "attention.block_count=16")
    found["spelling"] = [ssa("config", "recipes/ssa.yaml", *blocks, "attention.topk=authors")]
    for name, wanted in expected["exports"].items():
        found[f"load {name}"] = [load(f"exports/{name}", wanted)]
    wanted = expected["exports"]["ssa"]
    options = ("--mode", "sparse", "--max-new-tokens", len(wanted["tokens"]["sparse"]))
    found["generate"] = [ssa("generate", "exports/ssa", wanted["text_prompt"], *options)]
    found["import"] = [
        ssa("import", "exports/authors", "imported"),
        ssa("export", "imported", "again"),
        load("again", expected["exports"]["authors"]),
    ]
    found["status"] = [ssa("status", "runs/ssa", "--json")]
    found["report"] = [ssa("report", "runs/ssa")]
    targets = ("runs/ssa", "exports/ssa", "evaluation/results.json")
    found["evaluate"] = [ssa("evaluate", *targets, *expected["evaluate"], "--out", "evaluation-again")]
    return found


def ssa(*arguments: object) -> tuple:
    return ("-m", "ssa_megatron", *arguments)


def load(folder: str, wanted: dict) -> tuple:
    return ("-c", LOAD, folder, wanted["text_prompt"], len(wanted["tokens"]["full"]))


def run(old: Path, commands: list[tuple]) -> list[str]:
    """Standard output of each Python process in the unpacked folder; fails with all output unless it ends with 0."""
    package = Path(importlib.util.find_spec("ssa_megatron").submodule_search_locations[0])
    paths = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {key: value for key, value in os.environ.items() if key not in launcher}
    printed = []
    for command in commands:
        # its own cache of exported code: processes that fill one at the same time disturb each other
        own = {"PYTHONPATH": paths, "HF_HOME": tempfile.mkdtemp(dir=old)}
        line = [sys.executable, "-W", "ignore", *map(str, command)]
        done = subprocess.run(line, cwd=old, env=kept | ARITHMETIC | own, capture_output=True, text=True, timeout=250)
        said = f"{command[1:]} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        assert done.returncode == 0, said
        printed.append(done.stdout)
    return printed


@pytest.mark.parametrize("name", ["ssa", "nsa", "authors"])
def test_an_old_run_continues_bit_for_bit(old, expected, outputs, name):
    """It was stopped by SIGKILL after the step that follows a checkpoint; the same command makes the steps that are missing."""
    [output] = outputs(f"continue {name}")
    folder, wanted = old / "continued" / name, expected["runs"][name]
    assert f"restored step-{wanted['checkpoint']:08d}" in output
    found = {str(line["step"]): line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    assert list(found) == list(wanted["steps"])
    exact = same_arithmetic(expected["environment"], wanted["precision"])
    for step, figures in wanted["steps"].items():
        for key, value in figures.items():
            message = f"{key} of step {step}"
            if not isinstance(value, str):
                assert found[step][key] == value, message
            elif exact:
                assert float(found[step][key]).hex() == value, message
            elif key in ("loss", "lr", "sparse_share"):
                close = pytest.approx(float.fromhex(value), rel=LOSS_TOLERANCE[wanted["precision"]])
                assert found[step][key] == close, message
    last = folder / "checkpoints" / f"step-{int(list(found)[-1]):08d}"
    assert not exact or stored_digest(last) == wanted["digest"]


@pytest.mark.parametrize("name", ["psalms", "long"])
def test_an_old_dataset_verifies(expected, outputs, name):
    [output] = outputs(f"verify {name}")
    assert contains(json.loads(output), expected["verify"][f"data/{name}"])


def test_the_ledger_of_an_old_run_names_the_same_documents(expected, outputs):
    [output] = outputs("ledger")
    assert contains([json.loads(row) for row in output.splitlines()], expected["ledger"]["nsa"])


@pytest.mark.parametrize("name", ["ssa", "nsa", "authors"])
def test_an_old_recipe_resolves_to_the_same_values(old, outputs, name):
    """Both a recipe as a user writes it, and the config.yaml of a run, which has every field."""
    resolved = yaml.safe_load((old / "recipes" / f"{name}.resolved.yaml").read_text())
    for output in outputs(f"config {name}"):
        assert contains(yaml.safe_load(output), resolved)


def test_the_old_spelling_of_topk_is_accepted_on_the_command_line(outputs):
    [output] = outputs("spelling")
    assert yaml.safe_load(output)["attention"]["topk"] in SPELLINGS["authors"]


@pytest.mark.parametrize("name", ["ssa", "authors"])
def test_an_old_export_generates_what_it_generated(expected, outputs, name):
    [output] = outputs(f"load {name}")
    check_model(output, expected["exports"][name])


def test_generate_prints_the_same_text_from_an_old_export(expected, outputs):
    [output] = outputs("generate")
    assert output == expected["exports"]["ssa"]["text"]["sparse"]


def test_an_old_export_with_the_old_spelling_of_topk_is_imported_and_exported_again(old, expected, outputs):
    *_, output = outputs("import")
    recipe = yaml.safe_load((old / "imported" / "recipe.yaml").read_text())
    assert recipe["attention"]["topk"] in SPELLINGS["authors"]
    check_model(output, expected["exports"]["authors"])


def test_status_report_and_evaluate_read_an_old_run(old, expected, outputs):
    wanted = expected["runs"]["ssa"]
    [[output], _, _] = [outputs(verb) for verb in ("status", "report", "evaluate")]
    [state] = json.loads(output)
    reached, last = wanted["reached"], wanted["steps"][str(wanted["reached"])]
    assert (state["step"], state["steps"], state["checkpoint"]) == (reached, len(wanted["steps"]), wanted["checkpoint"])
    assert state["loss"] == float.fromhex(last["loss"])
    assert "old-ssa" in (old / "runs/ssa/report.html").read_text()
    folders = (old / "evaluation", old / "evaluation-again")
    before, after = (json.loads((folder / "results.json").read_text())["models"] for folder in folders)
    # measured again, then taken over from the old results
    for mine, theirs in zip(after, before + before, strict=True):
        assert contains(mine["budget"], theirs["budget"], tolerance=1e-5)


def check_model(output: str, wanted: dict) -> None:
    """Greedy tokens and logits in both modes, as LOAD printed them."""
    found = json.loads(output)
    assert found["prompt"] == wanted["prompt"]
    assert found["tokens"] == wanted["tokens"]
    for mode, rows in wanted["logits"].items():
        assert len(found["logits"][mode]) == len(rows)
        for mine, theirs in zip(found["logits"][mode], rows, strict=True):
            assert mine == pytest.approx(theirs, abs=LOGIT_TOLERANCE, rel=LOGIT_TOLERANCE), mode


def contains(found, wanted, tolerance: float = 0.0) -> bool:
    """Whether everything in `wanted` is in `found` with the same value; keys that are new are no difference."""
    if isinstance(wanted, dict):
        pairs = ((RENAMED.get(key, key), value) for key, value in wanted.items())
        return all(key in found and contains(found[key], value, tolerance) for key, value in pairs)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(contains(a, b, tolerance) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, float):
        return math.isclose(found, wanted, rel_tol=tolerance, abs_tol=tolerance)
    return found in SPELLINGS.get(wanted, (wanted,)) if isinstance(wanted, str) else found == wanted


def same_arithmetic(made_with: dict, precision: str) -> bool:
    """Whether this machine is expected to compute the bits of the one that made the archive."""
    here = {"torch": metadata.version("torch"), "machine": platform.machine()}
    if precision == "bf16":  # with AVX512 its matrix products take another way, whatever ARITHMETIC says
        here["vectors"] = vector_units()
    return all(made_with[key] == value for key, value in here.items())


def vector_units() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    flags = next((line for line in lines if line.startswith("flags")), "")
    return " ".join(sorted(flag for flag in flags.split() if flag.startswith(("avx", "amx"))))


def stored_digest(folder: Path) -> str:
    """sha256 over the whole masters and moments of a checkpoint in the order of their names, read as its format describes."""
    import torch
    from safetensors.torch import load_file

    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: load_file(folder / name) for name in manifest["files"]}
    sha = hashlib.sha256()
    for _, kinds in sorted(manifest["tensors"].items()):
        for kind in ("master", "exp_avg", "exp_avg_sq"):
            whole, parts = torch.full(kinds[kind]["shape"], math.nan), {}
            for piece in kinds[kind]["pieces"]:  # a range of elements of a rectangle of the tensor
                where = (tuple(piece["offset"]), tuple(piece["shape"]))
                flat = parts.setdefault(where, torch.full((math.prod(piece["shape"]),), math.nan))
                flat[slice(*piece["range"])] = files[piece["file"]][piece["key"]]
            for (offset, shape), flat in parts.items():
                whole[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))] = flat.view(shape)
            sha.update(whole.numpy().tobytes())
    return sha.hexdigest()
