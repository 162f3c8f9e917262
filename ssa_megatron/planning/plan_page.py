"""The plan as text for people and as a dictionary for programs."""

import shutil
from dataclasses import asdict
from pathlib import Path

from ssa_megatron.config import Recipe
from ssa_megatron.model.shapes import parameter_count
from ssa_megatron.optim import optimizer_of
from ssa_megatron.parallel import topology
from ssa_megatron.planning.communication import traffic
from ssa_megatron.planning.hardware import Hardware
from ssa_megatron.planning.search import SLACK, Candidate, changes

GIB = 2**30


def checkpoint_bytes(recipe: Recipe) -> int:
    """Of one checkpoint: fp32 masters, optimizer state, and under bf16 the working weights; names and manifest are small."""
    working = 2 if recipe.train.precision == "bf16" else 0
    return parameter_count(recipe) * (4 + optimizer_of(recipe).bytes_per_parameter + working)


def disk_needed(recipe: Recipe) -> int:
    """Bytes a run's checkpoints take at most: those kept, and the one being written."""
    return checkpoint_bytes(recipe) * (recipe.checkpoint.keep + 1)


def free_disk(run: Path) -> int:
    """Bytes free where `run` is, or will be."""
    there = run.resolve()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free


def render(plan: Candidate, best: list[Candidate], gpu: Hardware, run: Path | None) -> str:
    """The whole page; `run` is where the disk is asked, None to ask none."""
    blocks = [
        _title(plan, gpu),
        _memory(plan, gpu),
        _disk(plan.recipe, run),
        _communication(plan, gpu),
        _time(plan, gpu),
        _best(plan, best, gpu),
    ]
    return "\n\n".join(block for block in blocks if block)


def to_dict(plan: Candidate, best: list[Candidate], gpu: Hardware, run: Path) -> dict:
    """The same figures, bytes and seconds unrounded."""
    return {
        **_row(plan),
        "stages": [{**asdict(stage), "peak": stage.peak} for stage in plan.stages],
        "checkpoint": {
            "bytes": checkpoint_bytes(plan.recipe),
            "needed": disk_needed(plan.recipe),
            "free": free_disk(run),
        },
        "communication": [{**asdict(t), "wire": t.wire} for t in traffic(plan.recipe, plan.world)],
        "time": plan.speed.parts,
        "gpu": asdict(gpu),
        "best": [_row(candidate) for candidate in best],
    }


def _row(c: Candidate) -> dict:
    p, train = c.recipe.parallel, c.recipe.train
    return {
        "recipe": c.recipe.name,
        "world": c.world,
        **p.model_dump(),
        "data": topology.data_parallel_size(c.recipe, c.world),
        "zero": c.recipe.zero.stage,
        "micro_batch_rows": train.micro_batch_rows,
        "micro_batches": topology.micro_batches(c.recipe, c.world),
        "recompute": train.recompute,
        "needed": c.needed,
        "seconds": c.speed.seconds,
        "tokens_per_second": c.speed.tokens_per_second,
        "mfu": c.speed.mfu,
    }


def _title(plan: Candidate, gpu: Hardware) -> str:
    r, row = plan.recipe, _row(plan)
    sizes = f"tensor {row['tensor']}{' with sequence' if row['sequence'] else ''}, pipeline {row['pipeline']}"
    sizes += f" x {row['virtual_pipeline']}" if row["virtual_pipeline"] > 1 else ""
    return (
        f"{r.name}: {parameter_count(r):,} parameters, {r.attention.kind} attention, on {plan.world} {gpu.name}\n"
        f"{sizes}, context {row['context']}, data {row['data']}, ZeRO-{row['zero']}, recompute {row['recompute']}; a step is "
        f"{row['micro_batches']} micro-batch(es) of {row['micro_batch_rows']} row(s) of {r.train.sequence_length}"
    )


def _memory(plan: Candidate, gpu: Hardware) -> str:
    stages = plan.stages
    names = ["one rank"] if len(stages) == 1 else ["first stage", "last stage"]
    lines = [f"{'MEMORY, GiB':<34}" + "".join(f"{name:>13}" for name in names)]

    def add(label: str, values: list[int | None]) -> None:
        cells = "".join(f"{'' if v is None else f'{v / GIB:.2f}':>13}" for v in values)
        lines.append(f"  {label:<32}{cells}")

    for name in dict.fromkeys(item for stage in stages for item in stage.states):
        add(name, [stage.states.get(name) for stage in stages])
    held = " / ".join(f"{stage.in_flight:g}" for stage in stages)
    lines.append(f"  kept for backward, of {held} micro-batch(es) in flight")
    for name in dict.fromkeys(item for stage in stages for item in stage.kept):
        add(f"  {name}", [stage.kept.get(name) for stage in stages])
    lines.append("  alive at most, in each phase of a step")
    for name in dict.fromkeys(item for stage in stages for item in stage.phases):
        add(f"  {name}", [stage.phases.get(name) for stage in stages])
    add(f"allocator's slack, {SLACK:.0%}", [int(stage.peak * SLACK) for stage in stages])
    add("CUDA context, NCCL, kernels", [gpu.outside for _ in stages])
    add("needed", [int(stage.peak * (1 + SLACK)) + gpu.outside for stage in stages])
    verdict = "fits" if plan.needed <= gpu.memory else "does NOT fit"
    lines.append(f"  {verdict} in {gpu.memory / GIB:.1f} GiB; the peak is in: {plan.fullest.peak_phase}")
    if plan.fullest.host:
        lines.append(f"  in host memory, each rank: {plan.fullest.host / GIB:.2f}")
    return "\n".join(lines)


def _disk(recipe: Recipe, run: Path | None) -> str:
    one, keep, need = checkpoint_bytes(recipe), recipe.checkpoint.keep, disk_needed(recipe)
    line = f"CHECKPOINT  {one / GIB:.1f} GiB each; {keep} kept and one being written: {need / GIB:.1f} GiB"
    if run is None:
        return line
    free = free_disk(run)
    return f"{line}; free at {run}: {free / GIB:.1f} GiB{'' if need <= free else '  NOT ENOUGH'}"


def _communication(plan: Candidate, gpu: Hardware) -> str:
    found = traffic(plan.recipe, plan.world)
    if not found:
        return ""
    lines = [f"{'COMMUNICATION, one rank, a step':<50}{'payload GiB':>13}{'sent GiB':>13}"]
    for t in found:
        what = f"{t.group} ({t.ranks}): {t.operation}, {t.what}"
        lines.append(f"  {what:<48}{t.payload / GIB:>13.3f}{t.wire / GIB:>13.3f}")
    return "\n".join(lines)


def _time(plan: Candidate, gpu: Hardware) -> str:
    s = plan.speed
    rate = f"{s.tokens_per_second:,.0f} tokens/s ({s.tokens_per_second / plan.world:,.0f} per GPU)"
    lines = [
        f"TIME  {s.seconds:.3f} s per step, {rate}, {s.tokens_per_day / 1e9:.2f} billion tokens per day, MFU {s.mfu:.1%}"
    ]
    lines.append("  " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in s.parts.items()) + " s")
    train = plan.recipe.train
    days = train.steps * s.seconds / 86400
    tokens = train.steps * s.tokens
    lines.append(f"  the run: {train.steps:,} steps, {tokens / 1e9:,.1f} billion tokens, {days:,.1f} days")
    assumed = []
    if plan.world > 1:
        assumed += [
            f"{gpu.link / 1e9:.0f} GB/s within a node of {gpu.node}, {gpu.network / 1e9:.0f} GB/s between nodes"
        ]
    if plan.recipe.zero.offload_optimizer:
        assumed += [f"{gpu.host / 1e9:.0f} GB/s of host memory and {gpu.host_link / 1e9:.0f} GB/s to it, a rank"]
    if assumed:
        hidden = "; no communication is hidden behind computation" if plan.world > 1 else ""
        lines.append(f"  assumed, not measured: {', '.join(assumed)}{hidden}")
    return "\n".join(lines)


def _best(plan: Candidate, best: list[Candidate], gpu: Hardware) -> str:
    if not best:
        return ""
    lines = [f"BEST TOPOLOGIES of {plan.world} {gpu.name} that fit, fastest first"]
    head = ("tensor", "pipeline", "context", "data", "ZeRO", "rows", "recompute", "GiB", "s/step", "tok/s/GPU", "MFU")
    lines.append("  " + "".join(f"{name:>10}" for name in head))
    for c in best:
        row = _row(c)
        pipeline = f"{row['pipeline']}" + (f"x{row['virtual_pipeline']}" if row["virtual_pipeline"] > 1 else "")
        cells = (
            f"{row['tensor']}{'+SP' if row['sequence'] else ''}", pipeline, row["context"], row["data"], row["zero"],
            row["micro_batch_rows"], row["recompute"], f"{c.needed / GIB:.1f}", f"{c.speed.seconds:.3f}",
            f"{c.speed.tokens_per_second / c.world:,.0f}", f"{c.speed.mfu:.1%}",
        )  # fmt: skip
        mark = "" if changes(plan.recipe, c.recipe) else "  <- the recipe"
        lines.append("  " + "".join(f"{cell!s:>10}" for cell in cells) + mark)
    return "\n".join(lines)
