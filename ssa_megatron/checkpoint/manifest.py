"""The manifest: what makes a folder a checkpoint, and what a loader trusts.

It is written last, names every file with its size and sha256, and every tensor by its global name with the pieces that tile
it. A folder without a manifest that parses and matches its own sha256 is not a checkpoint, whatever else it holds.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from ssa_megatron.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
LATEST = "latest"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class StoredFile:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """`state` is the run's own (counters, data position). `tensors[global name][kind]` is `{"dtype", "shape", "pieces"}`.

    kind: `master` (fp32), `weight` (working precision; absent where it equals the master), or one of the optimizer's state names.

    A piece `{"file", "key", "offset", "shape", "range": [a, b]}` holds, under `key` in `file`, elements a..b (row-major) of the
    rectangle of `shape` at `offset` in the global tensor. Rectangles tile the tensor; ranges tile each rectangle.
    """

    step: int
    state: dict
    recipe: dict
    recipe_digest: str
    tokenizer_fingerprint: str
    files: dict[str, StoredFile]
    tensors: dict[str, dict[str, dict]]

    @property
    def is_start(self) -> bool:
        """Weights from elsewhere, before the first step: no counters, no data position, no optimizer state (initial.py)."""
        return not self.state

    def to_json(self) -> str:
        values = {"format": FORMAT, **asdict(self)}
        return json.dumps({**values, "sha256": _sha256(values)}, indent=1)

    @staticmethod
    def read(folder: Path) -> "Manifest":
        """Raises CheckpointError naming the file when it is missing, unreadable, altered or of another format."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT:
                raise CheckpointError(
                    f"{path}: another format version",
                    remedy="load it with the release that wrote it",
                    id="checkpoint-format-version",
                )
            if values.pop("sha256") != _sha256(values):  # a flipped digit is valid JSON and would train on
                raise CheckpointError(
                    f"{path}: altered since it was written (its own sha256 does not match)",
                    remedy="use another checkpoint",
                    id="manifest-altered",
                )
            del values["format"]
            values["files"] = {name: StoredFile(**entry) for name, entry in values["files"].items()}
            return Manifest(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path}: not a readable manifest ({type(error).__name__}: {error})",
                remedy="use another checkpoint",
                id="manifest-unreadable",
            ) from None


def _sha256(values: dict) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def committed(run: Path) -> list[Path]:
    """Committed step folders of a run, newest first. Temporary folders are not listed."""
    root = run / "checkpoints"
    found = []
    if root.is_dir():
        for path in root.iterdir():
            match = _STEP_FOLDER.fullmatch(path.name)
            if match and path.is_dir():
                found.append((int(match[1]), path))
    return [path for _, path in sorted(found, reverse=True)]
