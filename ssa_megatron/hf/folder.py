"""A Hugging Face folder as it lies on disk: its config.json, and its safetensors weights one tensor at a time.

Nothing of it is executed: remote code is not imported and no pickle is read. It refuses what is not there (config, a shard the
index names, a tensor the shard should hold), what is damaged, and weights that are not plain floating point.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssa_megatron.errors import CheckpointError

INDEX = "model.safetensors.index.json"
FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class HubFolder:
    """`config`: the parsed config.json. `shapes` and `dtypes`: of every stored tensor by name, from the files' headers."""

    def __init__(self, path: str | Path):
        """Raises CheckpointError naming the file that is missing or damaged."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{path}: no such folder",
                remedy="name a folder with config.json and *.safetensors",
                id="no-such-model-folder",
            )
        self.config = self.json("config.json")
        if self.config is None:
            raise CheckpointError(
                f"{path}: config.json is missing", remedy="name a Hugging Face model folder", id="config-json-missing"
            )
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._files: dict[str, safe_open] = {}
        self._where: dict[str, str] = {}
        index = self.json(INDEX)
        if index is None:
            self._read_headers(["model.safetensors"])
            return
        named = index.get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise CheckpointError(
                f"{self.path / INDEX}: no weight_map in it", remedy="copy the folder again", id="index-without-map"
            )
        self._read_headers(sorted(set(named.values())))
        for name, file in named.items():
            if self._where.get(name) != file:
                raise CheckpointError(
                    f"{self.path / file}: {name} is missing, which {INDEX} says is in it",
                    remedy="copy the file again",
                    id="indexed-tensor-missing",
                )

    def json(self, name: str) -> dict | None:
        """A JSON object of the folder; None when there is no such file."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{path}: not valid JSON ({error})", remedy="copy the file again", id="json-damaged"
            ) from None
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path}: holds {type(content).__name__}, not an object",
                remedy="copy it again",
                id="json-not-an-object",
            )
        return content

    def tensor(self, name: str) -> Tensor:
        """One stored tensor, on the CPU, in its stored dtype."""
        file = self._where[name]
        try:
            return self._files[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{self.path / file}: {name} cannot be read ({error})", id="source-tensor-unreadable"
            ) from None

    def _read_headers(self, files: list[str]) -> None:
        for file in files:
            path = self.path / file
            if not path.is_file():
                pickled = any(self.path.glob("*.bin"))
                raise CheckpointError(
                    f"{self.path}: {file} is missing" + (", and pickled *.bin weights are not read" if pickled else ""),
                    remedy="save it again with safetensors" if pickled else "copy the missing file",
                    id="weights-missing",
                )
            try:
                self._files[file] = opened = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path}: damaged ({error})", remedy="copy the file again", id="weights-damaged"
                ) from None
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                part = opened.get_slice(name)
                self.shapes[name], self._where[name] = tuple(part.get_shape()), file
                if part.get_dtype() not in FLOATS:
                    raise CheckpointError(
                        f"{path}: {name} is stored as {part.get_dtype()}: quantised weights cannot be trained",
                        remedy="import the unquantised model",
                        id="weights-quantised",
                    )
                self.dtypes[name] = FLOATS[part.get_dtype()]
