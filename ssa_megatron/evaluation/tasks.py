"""Tasks of lm-eval on an open model through its Hugging Face backend, unpatched, in both inference modes.

A task is a name lm-eval knows, a YAML file of its own form, or a `.jsonl` file of multiple-choice questions, which needs
no network: `{"question": text, "choices": [text, ...], "answer": index}` a line. It refuses, before any model is loaded,
unknown names, damaged files and a machine without lm-eval.
"""

import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml

from ssa_megatron.errors import ConfigError, DataProblem, EnvironmentProblem
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.targets import Opened


def check(tasks: Sequence[str]) -> None:
    """Raises EnvironmentProblem without lm-eval, ConfigError and DataProblem for tasks that cannot be run."""
    _library()
    with tempfile.TemporaryDirectory() as scratch:
        _manager(tasks, Path(scratch))


def run(opened: Opened, settings: Settings) -> dict:
    """`rows`: task, mode, documents, and its metrics with their standard errors (`acc`, `acc_stderr`, ...)."""
    lm_eval, backend = _library()
    was, rows = opened.model.config.inference_mode, []
    with tempfile.TemporaryDirectory() as scratch:
        manager, names = _manager(settings.tasks, Path(scratch))
        for mode in ("full", "sparse"):
            opened.model.set_attention(inference_mode=mode)
            lm = backend(pretrained=opened.model, tokenizer=opened.tokenizer, batch_size=settings.task_batch)
            try:
                found = lm_eval.simple_evaluate(
                    model=lm,
                    tasks=names,
                    num_fewshot=settings.few_shot,
                    limit=settings.limit,
                    task_manager=manager,
                    log_samples=False,
                    random_seed=settings.seed,
                    fewshot_random_seed=settings.seed,
                )
            except (OSError, ConnectionError) as error:
                raise EnvironmentProblem(
                    f"--tasks {','.join(settings.tasks)}: {str(error).splitlines()[0]}",
                    remedy="where no hub is reachable, give the questions as JSON lines, or HF_HOME with them in it",
                    id="task-data-not-loaded",
                ) from error
            finally:
                opened.model.set_attention(inference_mode=was)
            rows += [_row(task, mode, found) for task in found["results"]]
    return {"library": f"lm-eval {lm_eval.__version__}", "few_shot": settings.few_shot, "rows": rows}


def _library():
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise EnvironmentProblem(
            f"--tasks needs lm-eval, and {error.name or error} is not installed",
            remedy="pip install -e '.[evaluation]', or leave --tasks out",
            id="lm-eval-missing",
        ) from None
    return lm_eval, HFLM


def _manager(tasks: Sequence[str], scratch: Path):
    """(lm-eval's task manager, names of the tasks)."""
    from lm_eval.tasks import TaskManager

    names, folders = [], {scratch}
    for task in tasks:
        path = Path(task)
        if path.suffix == ".jsonl":
            names.append(_from_questions(path, scratch))
        elif path.suffix in (".yaml", ".yml"):
            names.append(_name_in(path))
            folders.add(path.resolve().parent)
        else:
            names.append(task)
    known_ones = any(name == task for name, task in zip(names, tasks, strict=True))
    manager = TaskManager(include_path=[str(folder) for folder in sorted(folders)], include_defaults=known_ones)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(
                f"--tasks: lm-eval has no task {name!r}", remedy="`lm-eval ls tasks` lists its own", id="unknown-task"
            )
    return manager, names


def _name_in(path: Path) -> str:
    try:
        # its own tags (!function) are lm-eval's affair; only the name is read here
        found = re.search(r"(?m)^task:\s*(\S+)\s*$", path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataProblem(
            f"--tasks {path}: cannot be read ({error})", remedy="name a task file of lm-eval", id="task-file-unreadable"
        ) from None
    if not found:
        raise DataProblem(
            f"--tasks {path}: has no line `task: NAME`", remedy="name a task file of lm-eval", id="task-without-name"
        )
    return found[1].strip("\"'")


def _from_questions(path: Path, scratch: Path) -> str:
    """Writes the task file of a file of questions; returns the task's name."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataProblem(
            f"--tasks {path}: cannot be read ({error})", remedy="name a file of JSON lines", id="questions-unreadable"
        ) from None
    for number, line in enumerate(lines, 1):
        if problem := _problem_of(line):
            raise DataProblem(
                f"--tasks {path}, line {number}: {problem}",
                remedy='a line is {"question": text, "choices": [text, text, ...], "answer": index from 0}',
                id="question-malformed",
            )
    if not lines:
        raise DataProblem(f"--tasks {path}: is empty", remedy="give at least one question", id="questions-empty")
    name = re.sub(r"\W+", "_", path.stem) or "questions"
    metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
    content = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}, "cache_dir": str(scratch / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": metrics,
    }
    (scratch / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return name


def _problem_of(line: str) -> str | None:
    try:
        record = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(record, dict) or not {"question", "choices", "answer"} <= record.keys():
        return "lacks question, choices or answer"
    question, choices, answer = record["question"], record["choices"], record["answer"]
    if not isinstance(question, str) or not isinstance(choices, list) or len(choices) < 2:
        return "question is not a text, or choices are not at least two"
    if not all(isinstance(choice, str) and choice for choice in choices):
        return "a choice is not a text"
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        return f"answer {answer!r} is not the index of a choice"
    return None


def _row(task: str, mode: str, found: dict) -> dict:
    metrics = {
        key.removesuffix(",none"): value
        for key, value in found["results"][task].items()
        if isinstance(value, int | float) and key.endswith(",none")
    }
    count = found.get("n-samples", {}).get(task, {}).get("effective")
    return {"task": task, "mode": mode, "documents": count, **metrics}
