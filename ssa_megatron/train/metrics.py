"""metrics.jsonl, the source of record of a run: one line per step, each step once, also after restarts; loggers get copies.

Floats are written so that they read back to the same bits. Opening for a resume drops lines of steps that will run again and
a last line torn by a kill.
"""

import json
import os
from pathlib import Path

from ssa_megatron.config import Recipe
from ssa_megatron.errors import RunFolderError
from ssa_megatron.files import replace_durably
from ssa_megatron.train.loggers import Loggers, open_loggers


class Metrics:
    """Append-only writer; used by the writer rank alone. A full disk delays lines, it does not lose them or end training."""

    def __init__(self, path: Path, *, resume_step: int, loggers: Loggers | None = None):
        """Steps up to and including `resume_step` stay; `loggers` get every line too, and are closed with the file."""
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step] if path.exists() else []
        replace_durably(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._loggers = loggers or Loggers([])

    @classmethod
    def open(cls, recipe: Recipe, run: Path, resume_step: int) -> "Metrics":
        """The run's metrics.jsonl and the loggers that its recipe asks for."""
        loggers = open_loggers(recipe, run, resume_step=resume_step)
        return cls(run / "metrics.jsonl", resume_step=resume_step, loggers=loggers)

    def write(self, step: int, values: dict) -> str | None:
        """`values` of one step; numbers and strings. The line is in the file when this returns, or it returns why not."""
        self._waiting += json.dumps({"step": step, **values}).encode() + b"\n"
        problem, of_loggers = self._append(), self._loggers.log(step, values)
        return problem or of_loggers

    def _append(self) -> str | None:
        before = os.fstat(self._file.fileno()).st_size
        try:
            written = self._file.write(self._waiting)
        except OSError as error:
            written, problem = -1, str(error)
        else:
            problem = "the disk took a part of the line only"
        if written == len(self._waiting):
            self._waiting = b""
            return None
        os.ftruncate(self._file.fileno(), before)  # no torn line in the middle of the file; it is written again later
        return f"metrics wait in memory: {problem}"

    def close(self) -> None:
        """Write what waits, if it can be written."""
        if self._waiting:
            self._append()
        self._file.close()
        self._loggers.close()


def read_metrics(path: Path, *, skip_damaged: bool = False) -> list[dict]:
    """All lines, in order; a last line torn by a kill is left out.

    Raises RunFolderError naming any other damaged line, or leaves it out with `skip_damaged`, for those who only look.
    """
    lines = []
    texts = path.read_text(errors="replace").splitlines()
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("not a step")
            lines.append(line)
        except ValueError as error:
            if skip_damaged or number == len(texts):
                continue
            raise RunFolderError(
                f"{path}, line {number}, is damaged ({error})",
                remedy="mend or remove that line; the lines after it are kept only if it can be read",
                id="metrics-damaged",
            ) from None
    return lines
