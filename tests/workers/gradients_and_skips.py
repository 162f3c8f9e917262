"""Worker: gradients at the optimizer's step against fp64 sums, and what a non-finite loss or gradient does to a step.

usage: python -m tests.workers.gradients_and_skips OUT.json [tensor]
With `tensor`, the ranks are tensor parallel with sequence parallelism, and only the gradients are measured.
Every case runs under every ZeRO stage.
"""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from ssa_megatron.model.build import build_model
from ssa_megatron.parallel.state import finalize, initialize
from ssa_megatron.train.step import Drawn, draw_batches, forward_backward
from tests.ssa_megatron.support import build, global_batch, gradients_at_step, own_rows, tiny, train_step

ZERO = {
    "ZeRO-1": {},
    "ZeRO-2": {"zero__stage": 2},
    "ZeRO-2, offloaded": {"zero__stage": 2, "zero__offload_optimizer": True},
    "ZeRO-3": {"zero__stage": 3},
    "ZeRO-3, offloaded": {"zero__stage": 3, "zero__offload_optimizer": True},
}
SKIPS = [
    (zero, precision)
    for zero in ZERO
    for precision in ("bf16", "fp32")
    if "offloaded" not in zero or precision == "bf16"
]
POISON = 52  # the last token id: `clean` never draws it


def fp64_sums(recipe, parallel, count: int, counted: float) -> list[torch.Tensor]:
    """Each parameter's gradient of the global batch: micro-batch gradients in the model's precision, summed in fp64."""
    model = build_model(recipe, parallel)  # plain: no DeepSpeed, nothing accumulates
    model.train()
    sums = [torch.zeros(p.shape, dtype=torch.float64) for p in model.parameters()]
    share = {"alignment_weight": recipe.attention.alignment_weight / count}  # each pass below is one of `count`
    alone = recipe.model_copy(update={"attention": recipe.attention.model_copy(update=share)})
    for batch in draw_batches(own_rows(recipe, parallel, 0), recipe, parallel, step=0):
        forward_backward(model, Drawn([batch], counted), alone, parallel)
        for total, parameter in zip(sums, model.parameters(), strict=True):
            gradient = parameter.grad.double()
            if recipe.parallel.sequence and parameter.dim() == 1:  # norms: each tensor-parallel rank saw its own tokens
                dist.all_reduce(gradient, group=parallel.tp_group)
                if (
                    recipe.zero.stage > 1
                ):  # reduced at once, so each micro-batch's gradient is one of the model's precision
                    gradient = gradient.to(parameter.dtype).double()
            total += gradient
            parameter.grad = None
    for total in sums:
        dist.all_reduce(total, group=parallel.dp_cp_group)
        total /= parallel.dp_cp_size
    return sums


SEQUENCE_PARALLEL = {"parallel__tensor": 2, "parallel__sequence": True, "train__sequence_length": 32}


def gradients(precision: str, parallel, **overrides) -> dict:
    """Largest relative error over parameters of the gradient the inner optimizer sees, and whether working = masters."""
    recipe = tiny(
        train__precision=precision,
        train__global_batch_rows=32,
        train__micro_batch_rows=2,
        optimizer__clip_grad_norm=0,
        **overrides,
    )
    count = 16 // parallel.dp_size
    batches = draw_batches(own_rows(recipe, parallel, 0), recipe, parallel, step=0)
    drawn = Drawn(batches, parallel.all_reduce_sum(sum(int(batch.counted.sum()) for batch in batches)))
    want = fp64_sums(recipe, parallel, count, drawn.counted)

    model, optimizer = build(recipe, parallel)
    model.train()
    before = [f.master.clone() for f in optimizer.fragments()]
    forward_backward(model, drawn, recipe, parallel, engine=optimizer.backward_engine)
    optimizer.finish_gradients()
    with gradients_at_step(optimizer) as found:
        norm, applied = optimizer.step(lr=1e-2)

    positions = {id(p): i for i, p in enumerate(model.parameters())}
    errors, elements = [], 0
    for fragment, gradient in found:
        expected = want[positions[id(fragment.named.parameter)]].view(-1)[
            fragment.start : fragment.start + fragment.numel
        ]
        errors.append(float((gradient.double() - expected).norm() / expected.norm()))
        elements += fragment.numel
    want_norm = float(torch.stack([w.norm() for w in want]).norm())
    working = all(torch.equal(f.working, f.master.to(f.working.dtype)) for f in optimizer.fragments())
    with gathered(list(model.parameters())):
        weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    copies = [torch.equal(weights, other) for other in parallel.all_gather_object(weights)]
    return {
        "gradient": max(parallel.all_gather_object(max(errors))),
        "norm": abs(norm - want_norm) / want_norm,
        "applied": applied,
        "elements": sum(parallel.all_gather_object(elements)),
        "parameters": sum(w.numel() for w in want),
        "working equals masters": all(parallel.all_gather_object(working)),
        "equal on all ranks": all(copies),
        "moved": all(not torch.equal(f.master, old) for f, old in zip(optimizer.fragments(), before, strict=True)),
    }


def gathered(parameters, **how):
    """Inside, parameters are whole under ZeRO-3 too."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, **how)


def clean(recipe, parallel, step: int) -> list:
    rows = global_batch(recipe, step)
    for row in rows:
        row.tokens[row.tokens == POISON] = 0
    return rows


def skips(precision: str, kind: str, parallel, **overrides) -> dict:
    """Steps 0, bad, 1 against steps 0, 1: `kind` loss poisons an embedding row only the last rank reads, gradient a gradient."""
    recipe = tiny(train__precision=precision, model__tied_embeddings=False, **overrides)
    last = parallel.rank == parallel.world_size - 1

    def step(model, optimizer, number: int, rows) -> dict:
        own = iter(rows[parallel.dp_rank :: parallel.dp_size])
        return asdict(train_step(model, optimizer, own, recipe, parallel, step=number, lr=1e-2))

    def state(optimizer) -> list[torch.Tensor]:
        return [t.clone() for f in optimizer.fragments() for t in (f.working, *f.stored.values())]

    model, optimizer = build(recipe, parallel)
    first = step(model, optimizer, 0, clean(recipe, parallel, 0))
    before, adam = state(optimizer), optimizer.applied_steps
    rows = clean(recipe, parallel, 7)
    embedding = model.chunks[0].embedding.word_embeddings.weight
    if kind == "loss":
        rows[-1].tokens[0, 5] = POISON  # the last micro-batch: the last data-parallel rank's
        with gathered(embedding, modifier_rank=0):
            kept = embedding.data[POISON].clone()
            embedding.data[POISON] = math.inf
        bad = step(model, optimizer, 7, rows)
        with gathered(embedding, modifier_rank=0):
            embedding.data[POISON] = kept
    else:
        hook = embedding.register_hook(lambda gradient: gradient * (math.inf if last else 1.0))
        bad = step(model, optimizer, 7, rows)
        hook.remove()
    unchanged = all(torch.equal(a, b) for a, b in zip(state(optimizer), before, strict=True))
    unchanged = unchanged and optimizer.applied_steps == adam
    after = step(model, optimizer, 1, clean(recipe, parallel, 1))

    other_model, other = build(recipe, parallel)
    same = step(other_model, other, 0, clean(recipe, parallel, 0)) == first
    expected = step(other_model, other, 1, clean(recipe, parallel, 1))
    equal = all(torch.equal(a, b) for a, b in zip(state(optimizer), state(other), strict=True))
    return {
        "first": first,
        "bad": parallel.all_gather_object({key: str(value) for key, value in bad.items()}),
        "unchanged": all(parallel.all_gather_object(unchanged)),
        "goes on as if it had not been": all(
            parallel.all_gather_object(same and equal and after == expected and after["applied"])
        ),
    }


def measure(parallel) -> dict:
    found = {}
    for zero, overrides in ZERO.items():
        for precision in ("bf16", "fp32"):
            found[f"gradients {precision} {zero}"] = gradients(precision, parallel, **overrides)
    for zero, precision in SKIPS:
        for kind in ("loss", "gradient"):
            found[f"skip {kind} {precision} {zero}"] = skips(precision, kind, parallel, **ZERO[zero])
    return found


def main() -> None:
    if sys.argv[2:] == ["tensor"]:
        parallel = initialize(tiny(**SEQUENCE_PARALLEL))
        found = {
            f"{precision} {zero}": gradients(precision, parallel, **SEQUENCE_PARALLEL, **overrides)
            for zero, overrides in ZERO.items()
            for precision in ("bf16", "fp32")
        }
    else:
        parallel = initialize(tiny())
        found = measure(parallel)
    if parallel.is_rank0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    finalize()


if __name__ == "__main__":
    main()
