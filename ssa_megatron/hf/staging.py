"""A folder that has its name only when it is whole: written beside it, flushed to disk, renamed at the end.

Whatever goes wrong before leaves nothing; a process that is killed leaves a `.tmp-` folder. A place that cannot be written, and a
full disk, are errors of the machine with the system's own words, not tracebacks.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ssa_megatron.errors import EnvironmentProblem
from ssa_megatron.files import sync_folder

REMEDY = "is there space on that disk, and may you write there?"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes `out`. Raises EnvironmentProblem for what the system refuses."""
    temporary = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        yield temporary
        for path in (*temporary.iterdir(), temporary):
            sync_folder(path)
        temporary.rename(out)
        sync_folder(out.parent)
    except OSError as error:
        raise EnvironmentProblem(
            f"{out}: {error.strerror or error} ({error.filename or temporary})",
            remedy=REMEDY,
            id="output-not-written",
        ) from error
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise EnvironmentProblem(
            f"{out}: {str(error).splitlines()[0]}", remedy=REMEDY, id="output-not-serialised"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # after a rename there is none
