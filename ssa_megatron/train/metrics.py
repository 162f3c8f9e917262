"""metrics.jsonl, the truth about a run: one line a step, each step once, also after restarts; TensorBoard beside it.

Floats are written so that they read back to the same bits. Opening for a resume drops lines of steps that will run again and
a last line torn by a kill.
"""

import json
from pathlib import Path


class Metrics:
    """Append-only writer; used by the writer rank alone."""

    def __init__(self, path: Path, *, resume_step: int, tensorboard: Path | None):
        """Steps up to and including `resume_step` stay; `tensorboard` is the event folder, or None."""
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        temporary = path.with_name(f".tmp-{path.name}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.rename(path)
        self._file = path.open("a")
        self._board = None
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard), purge_step=resume_step + 1 if resume_step else None)

    def write(self, step: int, values: dict) -> None:
        """`values` of one step; numbers and strings. Flushed: a line is there once the step is over."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict]:
    """All whole lines, in order; a torn last line is left out."""
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
