"""Worker: the Megatron model against the independent single-file model, in whatever topology it is launched.

usage: python -m tests.workers.oracle_agreement OUT.json [section.field=value ...]
Writes, per case, the relative errors of loss, alignment, gradient norm and the worst parameter's gradient.
"""

import json
import sys
from pathlib import Path

import torch

from ssa_megatron.config import resolve
from ssa_megatron.model.build import build_model
from ssa_megatron.model.names import named_parameters
from ssa_megatron.parallel.state import finalize, initialize
from ssa_megatron.train.step import Drawn, draw_batches, forward_backward
from ssa_megatron.zero.optimizer import ShardedOptimizer
from tests.oracle.model import OracleConfig, losses, random_weights
from tests.ssa_megatron.support import global_tensors, gradients_at_step

ROWS = 4  # two micro-batches on one process, one on each of two data-parallel ranks
LENGTH = 77  # odd; a topology that needs another length overrides train.sequence_length


class Rows:
    def __init__(self, tokens, doc_starts):
        self.tokens, self.doc_starts = tokens, doc_starts


def data(vocab_size: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed rows: one document, two, many short ones, and padding (documents of one token) at the end."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, vocab_size, (ROWS, length), generator=generator)
    starts = torch.zeros(ROWS, length, dtype=torch.int32)
    for row, begins in enumerate(([0], [0, 40], [0, 1, 8, 9, 33, 34, 35, 60], [0, 30, 70, 71, 72, 73, 74, 75, 76])):
        for begin in begins:
            starts[row, begin:] = begin
    return tokens, starts


def case_recipe(kind: str, tied: bool, overrides: dict):
    vocab = 53 if not tied else 54  # 53 leaves the second tensor-parallel rank one padding row
    recipe = {
        "name": "agreement",
        "model": dict(vocab_size=vocab, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_size=48,
                      max_sequence_length=LENGTH + 3, rope_theta=1000.0, tied_embeddings=tied),
        "attention": dict(kind=kind, block_size=4, block_count=3, window=9, sparse_probability=0.5),
        "optimizer": dict(clip_grad_norm=0.0),
        "train": dict(steps=1, sequence_length=LENGTH, global_batch_rows=ROWS, micro_batch_rows=2, precision="fp32"),
    }  # fmt: skip
    for key, value in overrides.items():
        section, field = key.split(".")
        recipe.setdefault(section, {})[field] = value
    return resolve(recipe, origin="test")


def set_weights(model, recipe, parallel, weights) -> None:
    for named in named_parameters(model, recipe, parallel):
        flat = named.parameter.data.view(-1)
        for slab in named.slabs:
            part = weights[slab.name][tuple(slice(o, o + n) for o, n in zip(slab.offset, slab.shape, strict=True))]
            flat[slab.start : slab.start + slab.numel] = part.float().flatten()


def oracle_values(config, weights, tokens, starts, trunks, alignment_weight):
    """The objective of the whole global batch: cross-entropy over all counted tokens, alignment a mean over micro-batches."""
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    counted, ce, alignment = 0, 0.0, 0.0
    for i, trunk in enumerate(trunks):
        rows = slice(2 * i, 2 * i + 2)
        here = int((starts[rows, 1:] == starts[rows, :-1]).sum())
        ce_i, alignment_i = losses(leaves, config, tokens[rows], starts[rows], trunk)
        ce, alignment, counted = ce + ce_i * here, alignment + alignment_i / len(trunks), counted + here
    ce = ce / counted
    (ce + alignment_weight * alignment).backward()
    return (
        float(ce.detach()),
        float(torch.as_tensor(alignment).detach()),
        {name: leaf.grad for name, leaf in leaves.items()},
    )


def run_case(kind: str, trunk: str, tied: bool, overrides: dict, parallel) -> dict:
    recipe = case_recipe(
        kind, tied, {**overrides, "attention.sparse_probability": {"full": 0.0, "sparse": 1.0}.get(trunk, 0.5)}
    )
    m, a = recipe.model, recipe.attention
    config = OracleConfig(
        vocab_size=m.vocab_size, hidden_size=m.hidden_size, num_layers=m.num_layers, num_heads=m.num_heads,
        num_kv_heads=m.num_kv_heads, head_dim=m.head_dim, ffn_size=m.ffn_size, rope_theta=m.rope_theta, norm_eps=m.norm_eps,
        tied=tied, kind=kind, block_size=a.block_size, block_count=a.block_count, window=a.window,
        alignment_weight=a.alignment_weight,
    )  # fmt: skip
    weights = random_weights(config, seed=3, std=0.2, dtype=torch.float64)  # large enough that routing has no near-ties
    weights = {name: w.float().double() for name, w in weights.items()}
    tokens, starts = data(m.vocab_size, recipe.train.sequence_length)
    model = build_model(recipe, parallel)
    set_weights(model, recipe, parallel, weights)
    optimizer = ShardedOptimizer(model, recipe, parallel)
    mine = [Rows(tokens[2 * g : 2 * g + 2], starts[2 * g : 2 * g + 2])
            for g in range(parallel.dp_rank, 2, parallel.dp_size)]  # fmt: skip
    batches = draw_batches(iter(mine), recipe, parallel, step=0)
    trunks = [None, None]
    for own in parallel.all_gather_object(
        [(i * parallel.dp_size + parallel.dp_rank, b.trunk) for i, b in enumerate(batches)]
    ):
        for number, drawn in own:
            trunks[number] = drawn
    drawn = Drawn(batches, parallel.all_reduce_sum(sum(int(b.counted.sum()) for b in batches)))
    losses = forward_backward(model, drawn, recipe, parallel, engine=optimizer.backward_engine).losses()
    loss, alignment = losses.cross_entropy, losses.alignment
    optimizer.finish_gradients()
    with gradients_at_step(optimizer) as at_step:
        norm, _ = optimizer.step(lr=1e-3)
    gradients = global_tensors(at_step, recipe, parallel)

    want_ce, want_alignment, want = oracle_values(config, weights, tokens, starts, trunks, a.alignment_weight)
    errors = {name: float((gradients[name].double() - g).norm() / g.norm()) for name, g in want.items()}
    want_norm = float(torch.stack([g.norm() for g in want.values()]).norm())
    worst = max(errors, key=errors.get)
    return {
        "case": f"{kind} {trunk} {'tied' if tied else 'untied'}",
        "trunks": trunks,
        "loss": abs(loss - want_ce) / want_ce,
        "alignment": abs(alignment - want_alignment) / max(want_alignment, 1e-30) if want_alignment else abs(alignment),
        "norm": abs(norm - want_norm) / want_norm,
        "gradient": errors[worst],
        "worst": worst,
    }


def main() -> None:
    out, *arguments = sys.argv[1:]
    overrides = {}
    for argument in arguments:
        key, value = argument.split("=")
        overrides[key] = json.loads(value) if value in ("true", "false") or value.isdigit() else value
    cases = [("ssa", trunk, True) for trunk in ("full", "sparse", "drawn")]
    cases += [(kind, "full", True) for kind in ("full", "moba", "nsa")] + [
        ("ssa", "drawn", False),
        ("nsa", "full", False),
    ]
    parallel = initialize(case_recipe("ssa", True, overrides))
    results = [run_case(*case, overrides, parallel) for case in cases]
    if parallel.is_rank0:
        Path(out).write_text(json.dumps(results))
    finalize()


if __name__ == "__main__":
    main()
