"""Worker: gradients at the optimizer's step against fp64 sums, and what a non-finite loss or gradient does to a step.

usage: python -m tests.workers.gradients_and_skips OUT.json [tensor]
With `tensor`, the ranks are tensor parallel with sequence parallelism, and only the gradients are measured.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from ssa_megatron.model.build import build_model
from ssa_megatron.parallel import context as parallel
from ssa_megatron.train.step import draw_batches, forward_backward, train_step
from tests.ssa_megatron.support import build, global_batch, own_rows, tiny

POISON = 52  # the last token id: `clean` never draws it


def fp64_sums(recipe, context, count: int, counted: float) -> list[torch.Tensor]:
    """Each parameter's gradient of the global batch: micro-batch gradients in the model's precision, summed in fp64."""
    model = build_model(recipe, context)  # plain: no DeepSpeed, nothing accumulates
    model.train()
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    for batch in draw_batches(own_rows(recipe, context, 0), recipe, context, step=0, count=count):
        forward_backward(model, [batch], recipe, context, counted=counted)
        for total, parameter in zip(sums, model.parameters(), strict=True):
            total += parameter.grad.double()
            parameter.grad = None
    for total, parameter in zip(sums, model.parameters(), strict=True):
        if getattr(parameter, "sequence_parallel", False):  # each tensor-parallel rank saw its own tokens
            dist.all_reduce(total, group=context.tensor_group)
        dist.all_reduce(total, group=context.data_group)
        total /= context.data_size
    return sums


SEQUENCE_PARALLEL = {"parallel__tensor": 2, "parallel__sequence": True, "train__sequence_length": 32}


def gradients(precision: str, context, **overrides) -> dict:
    """Largest relative error over parameters of the gradient the inner optimizer sees, and whether working = masters."""
    recipe = tiny(
        train__precision=precision,
        train__global_batch_rows=32,
        train__micro_batch_rows=2,
        optimizer__clip_grad_norm=0,
        **overrides,
    )
    count = 16 // context.data_size
    batches = draw_batches(own_rows(recipe, context, 0), recipe, context, step=0, count=count)
    counted = context.sum(sum(int(batch.counted.sum()) for batch in batches))
    want = fp64_sums(recipe, context, count, counted)

    model, optimizer = build(recipe, context)
    model.train()
    inner, seen, before = optimizer._inner, [], [p.detach().clone() for p in model.parameters()]
    apply = inner.step

    def look_and_step(*args, **kwargs):
        seen.extend((flat, flat.grad.detach().clone()) for group in inner.param_groups for flat in group["params"])
        return apply(*args, **kwargs)

    inner.step = look_and_step
    forward_backward(model, batches, recipe, context, counted=counted)
    optimizer.finish_gradients()
    norm, applied = optimizer.step(lr=1e-2)

    positions = {id(p): i for i, p in enumerate(model.parameters())}
    errors, elements = [], 0
    for fragment in optimizer.fragments():
        [(flat, gradient)] = [
            (f, g) for f, g in seen if f.data_ptr() <= fragment.master.data_ptr() < f.data_ptr() + 4 * f.numel()
        ]
        first = (fragment.master.data_ptr() - flat.data_ptr()) // 4
        found = gradient.view(-1)[first : first + fragment.numel].double()
        expected = want[positions[id(fragment.named.parameter)]].view(-1)[
            fragment.start : fragment.start + fragment.numel
        ]
        errors.append(float((found - expected).norm() / expected.norm()))
        elements += fragment.numel
    want_norm = float(torch.stack([w.norm() for w in want]).norm())
    working = all(torch.equal(f.working, f.master.to(f.working.dtype)) for f in optimizer.fragments())
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    copies = [torch.equal(weights, other) for other in context.gather(weights)]
    return {
        "gradient": max(context.gather(max(errors))),
        "norm": abs(norm - want_norm) / want_norm,
        "applied": applied,
        "elements": sum(context.gather(elements)),
        "parameters": sum(p.numel() for p in model.parameters()),
        "working equals masters": all(context.gather(working)),
        "equal on all ranks": all(copies),
        "moved": all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True)),
    }


def clean(recipe, context, step: int) -> list:
    rows = global_batch(recipe, step)
    for row in rows:
        row.tokens[row.tokens == POISON] = 0
    return rows


def skips(precision: str, kind: str, context) -> dict:
    """Steps 0, bad, 1 against steps 0, 1: `kind` loss poisons an embedding row only the last rank reads, gradient a gradient."""
    recipe = tiny(train__precision=precision, model__tied_embeddings=False)
    last = context.rank == context.world - 1

    def step(model, optimizer, number: int, rows) -> dict:
        own = iter(rows[context.data_rank :: context.data_size])
        return asdict(train_step(model, optimizer, own, recipe, context, step=number, lr=1e-2))

    def state(optimizer) -> list[torch.Tensor]:
        return [t.clone() for f in optimizer.fragments() for t in (f.working, f.master, f.exp_avg, f.exp_avg_sq)]

    model, optimizer = build(recipe, context)
    first = step(model, optimizer, 0, clean(recipe, context, 0))
    before, adam = state(optimizer), optimizer.applied_steps
    rows = clean(recipe, context, 7)
    embedding = model.embedding.word_embeddings.weight
    if kind == "loss":
        rows[-1].tokens[0, 5] = POISON  # the last micro-batch: the last data-parallel rank's
        kept = embedding.data[POISON].clone()
        embedding.data[POISON] = math.inf
        bad = step(model, optimizer, 7, rows)
        embedding.data[POISON] = kept
    else:
        hook = embedding.register_hook(lambda gradient: gradient * (math.inf if last else 1.0))
        bad = step(model, optimizer, 7, rows)
        hook.remove()
    unchanged = all(torch.equal(a, b) for a, b in zip(state(optimizer), before, strict=True))
    unchanged = unchanged and optimizer.applied_steps == adam
    after = step(model, optimizer, 1, clean(recipe, context, 1))

    other_model, other = build(recipe, context)
    same = step(other_model, other, 0, clean(recipe, context, 0)) == first
    expected = step(other_model, other, 1, clean(recipe, context, 1))
    equal = all(torch.equal(a, b) for a, b in zip(state(optimizer), state(other), strict=True))
    return {
        "first": first,
        "bad": context.gather({key: str(value) for key, value in bad.items()}),
        "unchanged": all(context.gather(unchanged)),
        "goes on as if it had not been": all(context.gather(same and equal and after == expected and after["applied"])),
    }


def measure(context) -> dict:
    found = {}
    for precision in ("bf16", "fp32"):
        found[f"gradients {precision}"] = gradients(precision, context)
        for kind in ("loss", "gradient"):
            found[f"skip {kind} {precision}"] = skips(precision, kind, context)
    return found


def main() -> None:
    if sys.argv[2:] == ["tensor"]:
        context = parallel.initialize(tiny(**SEQUENCE_PARALLEL))
        found = {precision: gradients(precision, context, **SEQUENCE_PARALLEL) for precision in ("bf16", "fp32")}
    else:
        context = parallel.initialize(tiny())
        found = measure(context)
    if context.is_writer:
        Path(sys.argv[1]).write_text(json.dumps(found))
    parallel.finalize()


if __name__ == "__main__":
    main()
