"""Worker: exports and imports a model of some 180 MB and tells how much memory each took beside it.

usage: python -m tests.workers.export_memory FOLDER OUT.json
Memory of our own only (RssAnon of Linux), sampled: pages of mapped files are the kernel's to take back.
"""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ssa_megatron.hf.export import export
from ssa_megatron.hf.importing import import_folder
from ssa_megatron.model.shapes import global_shapes
from ssa_pipelines import train_tokenizer
from tests.ssa_megatron.hf.conftest import VOCAB, corpus, tiny_recipe, write_run

SIZES = {"hidden_size": 512, "num_layers": 16, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 1408}


def own_memory() -> int:
    """Bytes."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def growth(act: Callable[[], object]) -> int:
    """By how much memory was larger than before, at most, while `act` ran."""
    before, most, done = own_memory(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.is_set():
            most = max(most, own_memory())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    act()
    done.set()
    thread.join()
    return most - before


def main() -> None:
    root, recipe = Path(sys.argv[1]), tiny_recipe(**SIZES)
    torch.set_num_threads(1)
    tokenizer = train_tokenizer(iter([corpus()]), root / "t.model", vocab_size=VOCAB - 3)
    weights = _random(recipe)
    size = sum(weight.nbytes for weight in weights.values())
    write_run(root / "run", recipe, weights, tokenizer)
    del weights
    small = write_run(root / "small", tiny_recipe(), _random(tiny_recipe()), tokenizer)
    import_folder(export(small, root / "small-out"), root / "small-again")  # what libraries take once
    found = {
        "weights": size,
        "export": growth(lambda: export(root / "run", root / "out")),
        "import": growth(lambda: import_folder(root / "out", root / "again")),
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


def _random(recipe) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) * 0.02 for name, shape in global_shapes(recipe).items()}


if __name__ == "__main__":
    main()
