"""`python -m ssa_megatron.hf.bench_generation`: tokens/s and cache traffic of sparse against full generation, on one GPU.

A model of the paper's 1B shape with random bf16 weights (speed does not depend on their values) decodes greedily, each row
behind a cache of random keys of the length asked for. `graph` is `hf/decode.py`, a CUDA graph a step, as `ssa generate` runs
it; `transformers` is the exported class and its own cache, step by step from Python, `prompt` its first forward over as many
tokens, each also without the bundled kernels. Rows are printed as they are measured and written as JSON. It refuses to run
without a CUDA device unless `--tiny` asks for a rehearsal.
"""

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import DynamicCache

from ssa_megatron.hf.bundle.cache_ssa import adopt_cache
from ssa_megatron.hf.bundle.configuration_ssa import SSAConfig
from ssa_megatron.hf.bundle.modeling_ssa import SSAForCausalLM
from ssa_megatron.hf.decode import Decoder

TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}  # fmt: skip


def random_model(device: str, tiny: bool) -> SSAForCausalLM:
    config = SSAConfig(**(TINY if tiny else {}))
    with torch.device("meta"):
        model = SSAForCausalLM(config)
    model = model.to(torch.float32 if tiny else torch.bfloat16).to_empty(device=device).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, config.initializer_range, generator=generator)
    model.tie_weights()
    return model


def seconds_a_step(step: Callable[[], object], steps: int, cuda: bool, uncounted: int = 3) -> float:
    """Mean over `steps` after some that are not counted."""
    for _ in range(uncounted):
        step()
    if cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps


def with_kernels(model, batch: int, length: int, mode: str, steps: int) -> dict:
    decoder = Decoder(model, batch, length + steps + 8, mode=mode)
    for cache in decoder.caches:
        for x, size in ((cache.keys, 1.0), (cache.values, 1.0), (cache.pooled, 0.25)):
            x.normal_(0, size)
        if cache.pooled.shape[2] == 2:
            cache.pooled[:, :, 1:] *= 2.0**-9  # what the first half rounded away
        cache.host_lengths = [length] * batch
        cache._publish_lengths()
    token = torch.ones(batch, dtype=torch.long, device=model.device)

    def step():
        token.copy_(decoder.step(token).argmax(-1))

    seconds = seconds_a_step(step, steps, model.device.type == "cuda")
    return {"ms": seconds * 1e3, "cache_gb": decoder.cache_bytes / 1e9, "read_gb": decoder.traffic(length) / 1e9}


@torch.inference_mode()
def with_transformers(model, batch: int, length: int, mode: str, steps: int) -> dict:
    c = model.config
    cache = adopt_cache(DynamicCache(), c.num_hidden_layers)
    for layer in cache.layers:
        shape = (batch, c.num_key_value_heads, length, c.head_dim)
        layer.update(*(torch.randn(shape, device=model.device, dtype=model.dtype) for _ in range(2)))
    token = torch.ones(batch, 1, dtype=torch.long, device=model.device)

    def step():
        logits = model(token, past_key_values=cache, use_cache=True, inference_mode=mode).logits
        token.copy_(logits[:, -1:].argmax(-1))

    seconds = seconds_a_step(step, steps, model.device.type == "cuda")
    held = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values, *(layer.pooled or ())))
    return {"ms": seconds * 1e3, "cache_gb": held / 1e9}


@torch.inference_mode()
def prompt(model, batch: int, length: int, mode: str, steps: int) -> dict:
    """`steps` are not used: the first forward compiles, the second is timed."""
    tokens = torch.randint(model.config.vocab_size, (batch, length), device=model.device)

    def run():
        model(tokens, past_key_values=DynamicCache(), use_cache=True, inference_mode=mode, logits_to_keep=1)

    run()
    return {"ms": seconds_a_step(run, 1, model.device.type == "cuda", uncounted=0) * 1e3}


def without_kernels(measure: Callable) -> Callable:
    def measured(model, *arguments) -> dict:
        model.config.sparse_backend = "torch"
        try:
            return measure(model, *arguments)
        finally:
            model.config.sparse_backend = "auto"

    return measured


PATHS = {
    "graph": with_kernels,
    "transformers": with_transformers,
    "transformers, PyTorch alone": without_kernels(with_transformers),
    "prompt": prompt,
    "prompt, PyTorch alone": without_kernels(prompt),
}
LONGEST_PROMPT = 32768


def rows(model, lengths: list[int], batches: list[int], steps: int, limit_s: float) -> Iterator[dict]:
    """One row a path, length, batch and mode; what would begin after `limit_s` is left out, and said."""
    began = time.monotonic()
    for path, measure in PATHS.items():
        prompts = path.startswith("prompt")
        for length in (n for n in lengths if not prompts or n <= LONGEST_PROMPT):
            for batch in batches if path == "graph" else batches[:1]:
                full = None
                for mode in ("full", "sparse"):
                    row = {"path": path, "tokens": length, "rows": batch, "mode": mode}
                    if time.monotonic() - began > limit_s:
                        yield row | {"left_out": f"after {limit_s:g} s"}
                        continue
                    if model.device.type == "cuda":
                        torch.cuda.empty_cache()
                    row |= measure(model, batch, length, mode, steps)
                    row["tokens_per_s"] = batch * (length if prompts else 1) * 1e3 / row["ms"]
                    full = full or row["ms"]
                    yield row | {"times_faster": full / row["ms"]}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ssa_megatron.hf.bench_generation", description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768, 131072])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds after which no new row begins")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a CPU, with a tiny model")
    parser.add_argument("--out", type=Path, default=Path("bench-generation.json"))
    a = parser.parse_args()
    if not (torch.cuda.is_available() or a.tiny):
        raise SystemExit("bench_generation needs a CUDA device (--tiny rehearses on a CPU)")
    device = "cpu" if a.tiny else "cuda"
    model, found = random_model(device, a.tiny), []
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "device": "cpu" if a.tiny else torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    print("  ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    for row in rows(model, a.tokens, a.batch, a.steps, a.limit):
        found.append({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()})
        print("  ".join(f"{key} {value}" for key, value in found[-1].items()), flush=True)
        a.out.write_text(json.dumps({**about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
