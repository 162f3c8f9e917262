"""Worker: the command line with one phase made long, so that something can be done to it there.

usage: python -m tests.workers.paused PHASE SECONDS RANK FOLDER ARGUMENTS...
Every rank, or RANK alone when it is not `all`, stays SECONDS in PHASE and touches FOLDER/PHASE-RANK when it enters it.
"""

import os
import sys
import time
from pathlib import Path

PHASES = {
    "libraries": ("ssa_megatron.config", "load_recipe"),
    "meeting": ("torch.distributed", "init_process_group"),
    "build": ("ssa_megatron.train.trainer", "build_model"),
    "restore": ("ssa_megatron.train.resume", "newest_valid"),
    "data": ("ssa_pipelines.stream.train_stream", "_collate"),
    "step": ("ssa_megatron.train.step", "forward_backward"),
    "evaluation": ("ssa_megatron.train.evaluation", "evaluation_rows"),
    "save": ("ssa_megatron.checkpoint.writer", "write_safetensors"),
}
"""Phase -> the function at whose beginning it is prolonged, once: (module, name)."""
SPARED = {"data": 6}
"""How many calls pass before the one that is prolonged."""


def prolong(phase: str, seconds: float, mark: Path) -> None:
    import importlib

    module, name = PHASES[phase]
    home = importlib.import_module(module)
    original, calls = getattr(home, name), [0]

    def slowly(*args, **kwargs):
        calls[0] += 1
        if calls[0] == SPARED.get(phase, 0) + 1:
            mark.touch()
            end = time.monotonic() + seconds  # a signal must not shorten it
            while (left := end - time.monotonic()) > 0:
                time.sleep(left)
        return original(*args, **kwargs)

    setattr(home, name, slowly)


if __name__ == "__main__":
    phase, seconds, rank, folder, *sys.argv[1:] = sys.argv[1:]
    own = os.environ.get("RANK", "0")
    if phase == "libraries":
        from ssa_megatron.cli import main

        if rank in ("all", own):
            prolong(phase, float(seconds), Path(folder) / f"{phase}-{own}")
    else:
        from ssa_megatron import cli
        from ssa_megatron.train import signals

        real = signals.StopRequest.listen

        def listen(
            self,
        ):  # the handlers first, as in the command itself; then the libraries, in which a phase is prolonged
            real(self)
            if rank in ("all", own):
                prolong(phase, float(seconds), Path(folder) / f"{phase}-{own}")
            return self

        signals.StopRequest.listen = listen
        main = cli.main
    main()
