"""The whole arc on a laptop, through the same commands a large run uses: each is printed before it runs.

Text from a package -> tokenizer -> MDS shards -> pretraining on two processes, killed half-way on purpose -> resume -> the same
run without interruption, compared bit for bit -> Hugging Face folder -> generation and perplexity in a process that can import
only torch and transformers -> report.html. It fails loudly if the resumed run differs from the uninterrupted one.
"""

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import ssa_pipelines
from ssa_megatron.checkpoint.reader import Checkpoint
from ssa_megatron.config import Recipe, load_recipe
from ssa_megatron.errors import ConfigError, SSAError
from ssa_megatron.evaluation.perplexity import split_documents
from ssa_megatron.report import write_report
from ssa_megatron.train.metrics import read_metrics

PROCESSES = 2
PROMPTS = ("In the beginning", "And the LORD said unto Moses,")
COMPARED = ("loss", "alignment", "grad_norm", "lr", "sparse_share", "eval/loss_full", "eval/loss_sparse")


class DemoFailed(SSAError):
    """A promise of the demo did not hold."""


def run_demo(out: Path) -> None:
    """Make `out` (emptied first if an earlier demo made it) and everything in it. Raises DemoFailed, ConfigError."""
    began = time.monotonic()
    marker = out / "made-by-ssa-demo"
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise ConfigError(
            f"{out} holds something that no demo made", remedy="give another folder with --out", id="demo-folder-taken"
        )
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()
    recipe = load_recipe("demo")

    def title(text: str) -> None:
        print(f"\n=== [{time.monotonic() - began:5.0f} s] {text}", flush=True)

    title("Tokenizer and shards from the King James text")
    tokenizer, data = out / "tokenizer.model", out / "data"
    source, length = "package:king-james", str(recipe.train.sequence_length)
    _ssa("tokenizer", "train", source, "--out", tokenizer, "--vocab-size", str(recipe.model.vocab_size))
    _ssa("data", "prepare", source, "--tokenizer", tokenizer, "--out", data, "--row-length", length,
         "--validation-fraction", "0.05")  # fmt: skip

    interrupted, whole = out / "run", out / "run-uninterrupted"
    kill_at = recipe.train.steps // 2 + recipe.checkpoint.interval // 4
    title(f"Pretraining on {PROCESSES} processes; SIGKILL to all of them after step {kill_at}")
    killed_at = _train_and_kill(interrupted, data, kill_at)
    title("The same command again: it continues from the last committed checkpoint")
    _train(interrupted, data)
    title("The same run without interruption, to compare")
    _train(whole, data)
    resume = _compare(interrupted, whole, recipe, killed_at)

    title("Export to a Hugging Face folder")
    folder = out / "hf"
    _ssa("export", interrupted, folder)
    title("In a process that can import only torch and transformers: perplexity and text")
    answer = _bare(folder, data, recipe)
    info = ssa_pipelines.load_dataset_info(data)
    extra = {
        "unigram_entropy": info.unigram_entropy,
        "resume": resume,
        "perplexity": answer["perplexity"],
        "samples": answer["samples"],
        "notes": [f"imported beside the standard library: {', '.join(answer['imported'])}"],
    }
    (interrupted / "report-extra.json").write_text(json.dumps(extra, indent=1))
    report = write_report(interrupted)
    final = read_metrics(interrupted / "metrics.jsonl")[-1]
    title("Done")
    print(
        f"validation loss {final['eval/loss_full']:.3f} (full) {final['eval/loss_sparse']:.3f} (sparse) nats/token; "
        f"the text's unigram entropy is {info.unigram_entropy:.3f}\n"
        f"every loss after the kill and the final weights: bit for bit those of the uninterrupted run\n"
        f"model {folder}   report {report}"
    )


def _ssa(*arguments: object) -> None:
    command = ["-m", "ssa_megatron", *map(str, arguments)]
    _say(["python", *command])
    _check(subprocess.run([sys.executable, *command], env=_environment()).returncode, command)


def _train_command(run: Path, data: Path) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "-m", "ssa_megatron",
            "train", "demo", f"data.path={data}", "--run-folder", str(run)]  # fmt: skip


def _train(run: Path, data: Path) -> None:
    command = _train_command(run, data)
    _say(["torchrun", *command[2:]])
    _check(subprocess.run([sys.executable, *command], env=_environment()).returncode, command)


def _train_and_kill(run: Path, data: Path, step: int) -> int:
    """Start training and, once `step` is in metrics.jsonl, kill launcher and ranks at once. Returns the last step written."""
    command = _train_command(run, data)
    _say(["torchrun", *command[2:]])
    process = subprocess.Popen([sys.executable, *command], env=_environment(), start_new_session=True)
    try:
        while process.poll() is None:
            done = _last_step(run)
            if done >= step:
                break
            time.sleep(0.1)
        else:
            raise DemoFailed(f"training ended by itself (exit code {process.returncode}) before step {step}")
    finally:
        _kill_session(process)
    done = _last_step(run)
    print(f"    killed after step {done}", flush=True)
    return done


def _kill_session(process: subprocess.Popen) -> None:
    """SIGKILL to the launcher, then to the ranks it started (torchrun gives each a session of its own)."""
    children = _descendants(process.pid)
    for pid in (process.pid, *children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return lines[-1]["step"] if lines else 0


def _compare(interrupted: Path, whole: Path, recipe: Recipe, killed_at: int) -> dict:
    """Every step's figures as hexadecimal floats, and the sha256 of final weights and moments; raises DemoFailed."""
    runs = [{line["step"]: line for line in read_metrics(run / "metrics.jsonl")} for run in (interrupted, whole)]
    steps = range(1, recipe.train.steps + 1)
    for step in steps:
        a, b = (run[step] for run in runs)
        for name in COMPARED:
            if name in a and float(a[name]).hex() != float(b[name]).hex():
                raise DemoFailed(
                    f"step {step}: {name} is {a[name]!r} after the resume, {b[name]!r} without interruption"
                )
    digests = [Checkpoint.open(run).digest() for run in (interrupted, whole)]
    if digests[0] != digests[1]:
        raise DemoFailed(f"final weights differ: sha256 {digests[0][:16]} after the resume, {digests[1][:16]} without")
    resumed = killed_at // recipe.checkpoint.interval * recipe.checkpoint.interval
    last = float(runs[0][recipe.train.steps]["loss"])
    print(
        f"\n    killed after step {killed_at}, resumed from step {resumed}: {len(steps)} steps compared, all equal\n"
        f"    last loss {last.hex()} = {last:.6f} in both; weights and moments sha256 {digests[0][:16]} in both"
    )
    return {
        "killed_at_step": killed_at,
        "resumed_from_step": resumed,
        "steps_compared": len(steps),
        "losses_equal": True,
        "weights_equal": True,
        "sha256": digests[0],
    }


def _bare(folder: Path, data: Path, recipe: Recipe) -> dict:
    """Perplexity in both modes and at four budgets, and continuations in both, computed by the exported folder alone."""
    from ssa_megatron.hf.isolated import run_isolated

    [*rows] = ssa_pipelines.evaluation_rows(
        data, rows=recipe.train.eval_rows, micro_batch_rows=1, data_parallel_rank=0, data_parallel_size=1
    )
    documents = [d for r in rows for d in split_documents(r.tokens, r.doc_starts)]
    everything = -(-recipe.train.sequence_length // recipe.attention.block_size)
    budgets = [(4, 4), (8, 8), (16, 16), ("all", everything)]
    job = {
        "folder": str(folder),
        "documents": documents,
        "perplexity": [{"mode": "full"}, *({"mode": "sparse", "block_count": count} for _, count in budgets)],
        "generate": [
            {"prompts": list(PROMPTS), "mode": mode, "max_new_tokens": 48, "temperature": 0.7, "seed": 1}
            for mode in ("full", "sparse")
        ],
    }
    answer = run_isolated(job)
    names = [None, *(name for name, _ in budgets)]
    table = []
    for name, found in zip(names, answer["perplexity"], strict=True):
        line = {
            "mode": found["mode"],
            "block_count": name,
            "nats": found["nats_per_token"],
            "perplexity": found["perplexity"],
        }
        table.append(line)
        budget = f" k={name}" if name else ""
        print(
            f"    {found['mode']:>6}{budget:<6}  perplexity {line['perplexity']:8.3f}   {line['nats']:.4f} nats/token"
        )
    samples = [
        {"mode": request["mode"], "prompt": prompt, "text": text}
        for request in answer["generated"]
        for prompt, text in zip(PROMPTS, request["texts"], strict=True)
    ]
    for sample in samples:
        print(f"    {sample['mode']:>6}: {sample['prompt']}|{sample['text']}".replace("\n", " / "))
    return {"perplexity": table, "samples": samples, "imported": answer["imported"]}


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONUNBUFFERED": "1"}


def _say(command: list[str]) -> None:
    print(f"$ {shlex.join(command)}", flush=True)


def _check(code: int, command: list[str]) -> None:
    if code:
        raise DemoFailed(f"{shlex.join(command)} ended with exit code {code}", remedy="its messages are above")
