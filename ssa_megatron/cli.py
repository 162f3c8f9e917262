"""The command line: `python -m ssa_megatron VERB`, installed as `ssa VERB`.

Verbs parse, call one function each, and print; decisions live elsewhere. An error a user can act on is printed with its remedy
and ends the process with its own exit code; anything else keeps its traceback.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from ssa_megatron import __version__
from ssa_megatron.cli_data import data_app, tokenizer_app
from ssa_megatron.errors import EXIT_REQUEUE, ConfigError, DataProblem, SSAError
from ssa_megatron.failure import fail
from ssa_pipelines.errors import DataError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__.splitlines()[0]
)
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(data_app, name="data")

RecipeName = Annotated[str, typer.Argument(help="a packaged recipe (demo, ssa-1b, ...) or a YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.field=value ...")]


@app.command()
def train(
    recipe: RecipeName,
    overrides: Overrides = None,
    run: Annotated[  # not --run: torchrun reads that as an abbreviation of its own --run-path
        Path | None, typer.Option("--run-folder", help="created, or continued; runs/NAME by default")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="A:B", help="record steps A to B with the profiler, into RUN/profile/")
    ] = None,
) -> None:
    """Pretrain, or continue the run in the folder. Alone in one process, or on many under torchrun."""
    from ssa_megatron.train.output import log_to_stderr, outlive_readers
    from ssa_megatron.train.profile_request import parse_range
    from ssa_megatron.train.signals import StopRequest

    outlive_readers()
    log_to_stderr()
    stop = StopRequest().listen()  # before anything slow: a signal may come at any time
    from ssa_megatron.config import load_recipe

    resolved = load_recipe(recipe, overrides or ())
    from ssa_megatron.parallel import topology
    from ssa_megatron.parallel.state import world_size
    from ssa_megatron.train import restarts

    topology.check(resolved, world_size())
    folder = run or Path("runs") / resolved.name
    restarts.check(folder, global_batch_rows=resolved.train.global_batch_rows)
    if int(os.environ.get("RANK", "0")) == 0:  # the imports below take seconds, and silence looks like a hang
        print(f"ssa {__version__}: recipe {resolved.name}, {world_size()} process(es); loading libraries", flush=True)
    from ssa_megatron.train.trainer import Trainer

    raise typer.Exit(Trainer(resolved, folder, stop=stop, profile_steps=parse_range(profile)).run())


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    world: Annotated[int, typer.Option(min=1, help="processes, one a GPU")] = 1,
    gpu: Annotated[str, typer.Option(help="a row of the table of measured hardware figures")] = "h100",
    memory_gib: Annotated[float | None, typer.Option(help="memory of one GPU, instead of the table's")] = None,
    link_gbytes: Annotated[float | None, typer.Option(help="GB/s a GPU sends within a node, instead")] = None,
    network_gbytes: Annotated[float | None, typer.Option(help="GB/s a GPU sends between nodes, instead")] = None,
    document: Annotated[int | None, typer.Option(min=1, help="tokens of a document; one a row by default")] = None,
    top: Annotated[int, typer.Option(min=0, help="how many of the best topologies to show")] = 5,
    run: Annotated[
        Path | None,
        typer.Option("--run-folder", help="whose disk and recipe are looked at; else the disk of runs/NAME"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of the page")] = False,
) -> None:
    """Before any GPU is held: is it legal, does it fit, how fast will it be, and what would be better. Starts nothing."""
    from ssa_megatron.config import load_recipe
    from ssa_megatron.planning.plan_command import plan as show_plan

    show_plan(
        load_recipe(recipe, overrides or ()),
        world,
        gpu=gpu,
        memory_gib=memory_gib,
        link_gbytes=link_gbytes,
        network_gbytes=network_gbytes,
        document=document,
        top=top,
        run=run,
        as_json=as_json,
    )


@app.command()
def doctor(
    cluster: Annotated[bool, typer.Option("--cluster", help="on every rank, under torchrun or srun")] = False,
    disk: Annotated[Path, typer.Option(help="where runs will be")] = Path("runs"),
    need_gib: Annotated[float, typer.Option(min=0, help="GiB that must be free there; `ssa plan` knows them")] = 10,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of the rendezvous")] = 29500,
    host: Annotated[list[str] | None, typer.Option(help="another machine whose name must resolve; repeat")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object instead of the page")] = False,
    timeout: Annotated[float, typer.Option(min=1, max=86400, help="seconds to wait for the other ranks")] = 60,
) -> None:
    """Is this machine, or with --cluster all of them, fit to train: OK, WARN, FAIL, and the remedy. Exit code 7 for a FAIL."""
    from ssa_megatron.doctor.doctor_command import doctor as examine

    found = examine(
        cluster=cluster,
        disk=disk,
        need_gib=need_gib,
        port=port,
        hosts=host or [],
        as_text=not as_json,
        timeout=timeout,
    )
    raise typer.Exit(found)


@app.command()
def status(
    targets: Annotated[
        list[str] | None, typer.Argument(help="run folders or SLURM job numbers; all runs by default")
    ] = None,
    runs: Annotated[Path, typer.Option(help="where run folders are looked for")] = Path("runs"),
    watch: Annotated[bool, typer.Option("--watch", help="again and again, until interrupted")] = False,
    every: Annotated[float, typer.Option(min=0.2, help="seconds between two looks, with --watch")] = 2.0,
    ranks: Annotated[bool, typer.Option("--ranks", help="where each rank is, too")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of the table")] = False,
) -> None:
    """Where runs stand: step, loss, speed, MFU, goodput, time left, last checkpoint, restarts. Reads their folders only."""
    from ssa_megatron.status.status_command import status as show

    show(targets or [], runs=runs, watch=every if watch else None, as_json=as_json, ranks=ranks)


@app.command()
def profile(
    run: Annotated[Path, typer.Argument(help="folder of a run that is training")],
    steps: Annotated[str, typer.Argument(metavar="A:B", help="steps to come, counted from 1")],
) -> None:
    """Have a running job record steps A to B with the profiler, into RUN/profile/."""
    from ssa_megatron.status.status_command import ask_for_profile
    from ssa_megatron.train.profile_request import parse_range

    print(ask_for_profile(run, parse_range(steps)))


@app.command("config")
def show_config(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Print a recipe resolved, every default written out."""
    from ssa_megatron.config import dump_recipe, load_recipe

    print(dump_recipe(load_recipe(recipe, overrides or ())), end="")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for everything the demo makes; emptied first")] = Path("runs/demo"),
) -> None:
    """The whole arc in minutes on a laptop: text, tokenizer, shards, training, a kill, a resume, export, generation."""
    from ssa_megatron.demo import run_demo

    run_demo(out)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run folder")]) -> None:
    """Write report.html into a run folder: curves, figures, samples."""
    from ssa_megatron.report import write_report

    print(write_report(run))


@app.command("export")
def export_run(
    run: Annotated[Path, typer.Argument(help="run folder or step folder")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write; must not exist")],
    step: Annotated[int | None, typer.Option(help="checkpoint step; the newest by default")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; what training computed in by default")] = None,
) -> None:
    """Convert a checkpoint to a Hugging Face folder that loads with torch and transformers alone."""
    from ssa_megatron.hf.export import export

    print(export(run, out, step=step, dtype=dtype))


@app.command("import")
def import_model(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder: of `ssa export`, Llama, or the authors'")],
    run: Annotated[Path, typer.Argument(help="run folder to make; must not exist")],
    overrides: Overrides = None,
    tokenizer: Annotated[Path | None, typer.Option(help="where the folder has none that can be used")] = None,
) -> None:
    """Turn a Hugging Face folder into a run folder with its weights as step 0 and a recipe to train on with."""
    from ssa_megatron.hf.importing import import_folder

    recipe = import_folder(folder, run, overrides or (), tokenizer=tokenizer)
    print(f"{run}: {recipe.attention.kind} model at step 0; prepare data with the tokenizer in it, then")
    print(f"  ssa train {run / 'recipe.yaml'} data.path=DATA --run-folder {run}")


@app.command()
def generate(
    target: Annotated[Path, typer.Argument(help="Hugging Face folder written by `ssa export`, or a run folder")],
    prompts: Annotated[list[str] | None, typer.Argument(help="none: lines of standard input, or a dialogue")] = None,
    mode: Annotated[str | None, typer.Option(help="full or sparse; the model's own by default")] = None,
    block_count: Annotated[int | None, typer.Option(help="blocks per token in sparse mode; the model's own")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(help="share of the probability that is drawn from")] = 1.0,
    seed: Annotated[int, typer.Option()] = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one")] = None,
) -> None:
    """Continue prompts, token by token, in either inference mode; speed and cache memory go to standard error."""
    from ssa_megatron.hf.token_stream import Settings, run

    run(target, prompts or (), Settings(mode, block_count, max_new_tokens, temperature, top_p, seed), device=device)


@app.command()
def evaluate(
    targets: Annotated[
        list[Path], typer.Argument(help="run folders, exported folders, or results.json of earlier ones")
    ],
    out: Annotated[Path, typer.Option(help="folder for results.json, report.html and pictures")] = Path(
        "runs/evaluation"
    ),
    parts: Annotated[str, typer.Option(help="of budget, length, needle, attention")] = "budget,length,needle,attention",
    data: Annotated[str | None, typer.Option(help="dataset whose held-out documents are read; the first run's")] = None,
    text: Annotated[list[str] | None, typer.Option(help="files of text, or package:king-james, instead")] = None,
    haystack: Annotated[list[str] | None, typer.Option(help="text to hide the needle in; the same by default")] = None,
    lengths: Annotated[str, typer.Option(help="by default 1/2, 1, 2 and 4 times the training length")] = "",
    budgets: Annotated[str, typer.Option(help="blocks a token in sparse mode")] = "1,2,4,8,16,all",
    tokens: Annotated[int, typer.Option(help="scored at each budget, at most")] = 65536,
    sequences: Annotated[int, typer.Option(help="of the longest length, at most")] = 8,
    haystacks: Annotated[int, typer.Option(help="for each context and depth; 8 needles each")] = 1,
    depths: Annotated[str, typer.Option(help="of the needle, 0 to 1")] = "0,0.25,0.5,0.75,1",
    rope_factor: Annotated[float | None, typer.Option(help="Llama-3 RoPE scaling; none by default")] = None,
    tasks: Annotated[str, typer.Option(help="of lm-eval: names, .yaml files, .jsonl files of questions")] = "",
    task_batch: Annotated[int, typer.Option(help="rows of an lm-eval batch")] = 8,
    few_shot: Annotated[int, typer.Option(help="examples before each question of a task")] = 0,
    limit: Annotated[int | None, typer.Option(help="questions of a task, at most")] = None,
    step: Annotated[int | None, typer.Option(help="checkpoint step of run folders; the newest by default")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; as stored by default")] = None,
    batch_tokens: Annotated[int, typer.Option(help="of a forward")] = 8192,
    seed: Annotated[int, typer.Option(help="draws the needles")] = 0,
) -> None:
    """Perplexity by budget and length, needle in a haystack, attention, lm-eval tasks; several models side by side."""
    from ssa_megatron.evaluation.measure_settings import Settings, numbers

    settings = Settings(
        parts=tuple(dict.fromkeys(parts.split(",") + (["tasks"] if tasks else []))),
        lengths=numbers(lengths, "--lengths"),
        budgets=numbers(budgets, "--budgets", words=("all",)),
        tokens=tokens,
        sequences=sequences,
        haystacks=haystacks,
        depths=numbers(depths, "--depths", float),
        rope_factor=rope_factor,
        tasks=tuple(filter(None, tasks.split(","))),
        task_batch=task_batch,
        few_shot=few_shot,
        limit=limit,
        dtype=dtype,
        batch_tokens=batch_tokens,
        seed=seed,
    )
    from ssa_megatron.evaluation.evaluate_command import evaluate as measure

    measure(
        targets, settings, out=out, sources=text or (), data=data, haystack=haystack or (), step=step, device=device
    )


def main() -> None:
    """Run a verb; exit codes: 0 done, 75 retryable, others as in errors.py."""
    _quiet_libraries()
    try:
        code = app(standalone_mode=False)  # so called, it returns the code of typer.Exit instead of raising it
        # everything is on disk; taking the libraries down would cost seconds of the grace time
        if code == EXIT_REQUEUE:
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code or 0)
    except typer.Abort:
        sys.exit(130)
    except DataError as error:
        fail(DataProblem(error.problem, remedy=error.remedy, id=error.id))
    except SSAError as error:
        fail(error)
    except Exception as error:
        kernels = sys.modules.get("ssa_kernels.spec")  # it imports torch, which most verbs do without
        if kernels is not None and isinstance(error, kernels.KernelArgumentError):
            remedy = "change the attention section of the recipe"
            fail(ConfigError(str(error), remedy=remedy, id="kernel-argument"))
        # usage errors of the argument parser know how to show themselves
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


def _quiet_libraries() -> None:
    # Advice of the libraries about parts that are switched off here on purpose; SSA_WARNINGS=1 shows it.
    if os.environ.get("SSA_WARNINGS") != "1":
        for module in ("megatron", "deepspeed", "torch", "transformers", "streaming"):
            warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")


if __name__ == "__main__":
    main()
