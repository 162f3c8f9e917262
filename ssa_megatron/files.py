"""Files that are either whole or not there: written beside, on disk (fsync), renamed.

A crash, a full disk or a second reader never meets half a file of ours under its final name.
"""

import os
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write UTF-8 text; it is on disk when this returns."""
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, text: str) -> None:
    """Write `path` whole or leave it as it was; on an OSError nothing is left beside it."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write_durably(temporary, text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """The folder's entries (renames, new files) are on disk when this returns."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
