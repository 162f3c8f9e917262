"""The package imports no other of the project, loads fast, and has its public names."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import ssa_pipelines
from tests.launch import environment

FOLDER = Path(ssa_pipelines.__file__).parent
OTHERS = {"ssa_megatron", "ssa_kernels", "ssa_cluster", "tests"}


def test_it_does_not_import_the_projects_other_packages():
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {module.split(".")[0] for module in modules} & OTHERS, path


def test_importing_it_and_using_a_tokenizer_does_not_import_torch_or_streaming(tokenizer):
    program = f"""
import sys, ssa_pipelines
ssa_pipelines.Tokenizer.load({str(tokenizer.path)!r}).encode(["text"])
print(sorted({{"torch", "streaming", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "[]\n", done.stderr


def test_every_public_name_exists_also_after_its_module_was_imported():
    for module in FOLDER.rglob("*.py"):
        importlib.import_module(".".join(module.relative_to(FOLDER.parent).with_suffix("").parts))
    for name in ssa_pipelines.__all__:
        assert callable(getattr(ssa_pipelines, name)) or isinstance(getattr(ssa_pipelines, name), str), name


def test_every_error_has_a_problem_and_a_remedy():
    error = ssa_pipelines.DataError("file x: bad", remedy="make it good")
    assert (error.problem, error.remedy) == ("file x: bad", "make it good")
    assert str(error) == "file x: bad\n  remedy: make it good"
    shard = ssa_pipelines.ShardError("a/b.mds", "missing")
    assert shard.shard == "a/b.mds"
    assert str(shard).startswith("shard a/b.mds: missing\n  remedy: ")


def test_the_readmes_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = (FOLDER.parent / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict = {}
    exec(example, names)
    assert names["tokens"].shape == names["doc_starts"].shape == (4, 1024)
    assert (str(names["tokens"].dtype), str(names["doc_starts"].dtype)) == ("torch.int64", "torch.int32")
