"""Trains a small model to do what the needle asks, and nothing else: what the needle part says of a model that can.

`python -m tests.ssa_megatron.evaluation.retrieval [STEPS]` trains it on contexts of 48 to 96 tokens,
on both modes in turn, and prints how it
retrieves at these and longer ones, in both modes.
"""

import itertools
import random
import sys
import tempfile
from pathlib import Path

import torch

import ssa_pipelines
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.needle import build, needle, stream
from ssa_megatron.evaluation.targets import Opened
from ssa_megatron.evaluation.text import Text
from ssa_megatron.hf.bare import load_tokenizer
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from ssa_megatron.hf.tokenizer_export import write_tokenizer

CONTEXTS = (48, 64, 96)


def trained(folder: Path, steps: int) -> tuple[Opened, Text]:
    """A model of 2 layers and 4 blocks of 16 tokens, and the haystack it was trained in: 60 chapters of scripture."""
    chapters = list(itertools.islice(ssa_pipelines.demo_documents(), 60))
    ssa_pipelines.train_tokenizer(iter(chapters), folder / "t.model", vocab_size=2045)
    write_tokenizer(ssa_pipelines.Tokenizer.load(folder / "t.model"), folder, max_length=128)
    tokenizer, haystack = load_tokenizer(folder), Text("60 chapters", chapters)
    torch.manual_seed(0)
    config = SSAConfig(
        vocab_size=2048,
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=max(CONTEXTS),
        rope_theta=10000.0,
        block_count=4,
    )
    model = SSAForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 50))
    draw, hay = random.Random(0), stream(tokenizer, haystack)
    for step in range(steps):
        context = draw.choice(CONTEXTS)
        samples = [
            sample for _ in range(4) for sample in build(tokenizer, hay, context, draw.random(), str(draw.random()), 8)
        ]
        answers, text = losses(model, samples, context, ("full", "sparse")[step % 2])
        (answers + 0.1 * text).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        warm_up.step()
    return Opened(model.eval(), tokenizer, {"name": "retrieval", "dtype": "float32"}, folder), haystack


def losses(model, samples, context: int, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats per token of the answers alone, and of all text."""
    longest = max(len(sample.candidates[0]) for sample in samples)
    rows = [(sample.prompt + sample.candidates[0] + [-100] * longest)[: context + longest] for sample in samples]
    targets = torch.tensor(rows)
    logits = model(targets.clamp(min=0), inference_mode=mode, use_cache=False).logits[:, :-1].transpose(1, 2)
    nats = torch.nn.functional.cross_entropy(logits, targets[:, 1:], reduction="none")
    asked = nats[:, context - 1 :]
    return asked.sum() / (asked != 0).sum(), nats.sum() / (nats != 0).sum()


def main(steps: str = "400") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        one, haystack = trained(Path(scratch), int(steps))
    found = needle(one, haystack, Settings(lengths=(48, 96, 192, 384, 768), haystacks=2))
    for mode in ("full", "sparse"):
        print(f"{mode}: ranked first / written greedily, by depth (down) and context")
        for depth in found["depths"]:
            cells = [cell for cell in found["cells"] if (cell["mode"], cell["depth"]) == (mode, depth)]
            shares = "  ".join(f"{cell['context']:>4}: {cell['ranked']:.2f} / {cell['greedy']:.2f}" for cell in cells)
            print(f"  {depth:.2f}  {shares}")


if __name__ == "__main__":
    main(*sys.argv[1:])
