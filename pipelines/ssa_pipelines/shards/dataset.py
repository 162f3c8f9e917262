"""A prepared dataset's description: the typed contents of `dataset.json`, and the checks every reader starts with.

Its sha256 is the dataset's fingerprint. It covers the sha256 of every shard and index, so it pins every byte of the dataset.
It refuses incomplete or edited folders, and recipes with another tokenizer, vocabulary or row length.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ssa_pipelines.errors import DatasetError, DatasetMismatch
from ssa_pipelines.storage import object_store as storage
from ssa_pipelines.storage.shard_cache import Access, Cache, Wanted, read_remote

FORMAT = 2
FILE_NAME = "dataset.json"
RECORDS_NAME = "records.json"


@dataclass(frozen=True)
class StoredFile:
    """A file of the dataset: its size in bytes and its sha256 (hexadecimal)."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """One split. `tokens` counts bos and eos, not padding. `files`: those of the split's folder, by name.

    lengths: documents by length in tokens, marks included. Entry k counts those of 2**(k-1) < tokens <= 2**k.
    """

    rows: int
    tokens: int
    padding: int
    documents: int
    text_bytes: int
    lengths: list[int]
    files: dict[str, StoredFile]


@dataclass(frozen=True)
class DatasetInfo:
    """The contents of `dataset.json`.

    unigram_entropy: entropy of the training tokens without bos and padding, in nats per token: the loss of a model that
        has learnt only the frequencies.
    validation_unigram_cross_entropy: of the validation tokens under the training frequencies, in nats per token. Each count
        is increased by one so that an unseen token has a finite cost. None without a validation split.
    duplicates: documents left out because an equal one came before, in this source or one prepared with it.
    files: those outside of the splits: the tokenizer, and records.json, [[file of text, number of records], ...].
    inputs: what the dataset was made from and how; equal inputs give equal bytes.
    fingerprint: sha256 over all other fields.
    path: the folder; for a remote dataset its folder in the cache. remote: its URL, or None.
    """

    path: Path
    remote: str | None
    row_length: int
    vocab_size: int
    token_dtype: str
    bos_id: int
    eos_id: int
    tokenizer_file: str
    tokenizer_fingerprint: str
    unigram_entropy: float
    validation_unigram_cross_entropy: float | None
    duplicates: int
    splits: dict[str, SplitInfo]
    files: dict[str, StoredFile]
    inputs: dict
    fingerprint: str

    @property
    def location(self) -> str:
        """Path or URL of the dataset, for messages."""
        return self.remote or str(self.path)

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer's model file on this machine."""
        return self.path / self.tokenizer_file

    def split(self, name: str) -> SplitInfo:
        """The split `name`. Raises DatasetError naming the splits there are."""
        if name not in self.splits:
            remedy = "prepare with a validation_fraction above 0" if name == "validation" else "name one of these"
            problem = f"{self.location}: no split {name!r}, only {', '.join(self.splits)}"
            raise DatasetError(problem, remedy=remedy, id="unknown-split")
        return self.splits[name]


def to_json(info: DatasetInfo) -> dict:
    """The contents of `dataset.json` as plain values."""
    record = {"format": FORMAT, **asdict(info)}
    del record["path"], record["remote"]
    return record


def with_fingerprint(record: dict) -> dict:
    """`record` with its `fingerprint` computed over all other entries."""
    record = {key: value for key, value in record.items() if key != "fingerprint"}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {**record, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def load_dataset_info(location: str | Path, access: Access | None = None) -> DatasetInfo:
    """Reads the `dataset.json` of a folder or a URL. For a URL it also downloads the tokenizer and the list of records.

    Raises DatasetError if there is no complete dataset, it has another format, or the file was altered; ShardError if a
    remote one cannot be downloaded.
    """
    if not storage.is_remote(location):
        path = Path(location)
        file = path / FILE_NAME
        if not file.is_file():
            raise DatasetError(
                f"{path}: not a prepared dataset ({FILE_NAME} is missing)",
                remedy="prepare it first, or correct the path",
                id="not-a-dataset",
            )
        return _parse(file.read_bytes(), str(file), path, None)
    access, remote = access or Access(), str(location).rstrip("/")
    url = storage.join(remote, FILE_NAME)
    found = _parse(read_remote(url, access), url, Path(), remote)
    folder = access.root.expanduser() / found.fingerprint[:20]
    cache = Cache(remote, folder, access)
    for name, stored in found.files.items():
        cache.fetch(Wanted(name, stored.bytes, stored.sha256))
    return replace(found, path=folder)


def _parse(data: bytes, shown: str, path: Path, remote: str | None) -> DatasetInfo:
    remedy = "restore the file, or prepare the dataset again"
    try:
        record = json.loads(data)
        if record["format"] != FORMAT:
            problem = f"{shown}: format {record['format']}, this program reads {FORMAT}"
            raise DatasetError(problem, remedy="prepare the dataset again", id="dataset-format")
        if with_fingerprint(record)["fingerprint"] != record["fingerprint"]:
            problem = f"{shown}: altered since it was written (its fingerprint does not match)"
            raise DatasetError(problem, remedy=remedy, id="dataset-altered")
        del record["format"]
        splits = {
            name: SplitInfo(**{**split, "files": {f: StoredFile(**v) for f, v in split["files"].items()}})
            for name, split in record.pop("splits").items()
        }
        files = {name: StoredFile(**file) for name, file in record.pop("files").items()}
        return DatasetInfo(path=path, remote=remote, splits=splits, files=files, **record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{shown}: damaged ({error})", remedy=remedy, id="dataset-damaged") from error


def check_compatible(info: DatasetInfo, *, tokenizer_fingerprint: str, vocab_size: int, row_length: int) -> None:
    """Raises DatasetMismatch, with both values, unless a model can train on this dataset.

    tokenizer_fingerprint and row_length must equal the dataset's. `vocab_size`, the rows of the model's embedding, must be
    at least that of the dataset's tokenizer.
    """
    remedy = "prepare the dataset with this recipe's tokenizer and row length, or name the dataset that fits"
    for field, wanted in {"tokenizer_fingerprint": tokenizer_fingerprint, "row_length": row_length}.items():
        found = getattr(info, field)
        if found != wanted:
            problem = f"{info.location}: {field} is {found} in the dataset, {wanted} in the recipe"
            raise DatasetMismatch(problem, remedy=remedy, id="dataset-unlike-recipe")
    if info.vocab_size > vocab_size:
        raise DatasetMismatch(
            f"{info.location}: vocab_size is {info.vocab_size} in the dataset's tokenizer, "
            f"only {vocab_size} in the recipe's model",
            remedy="raise model.vocab_size, or train a smaller tokenizer",
            id="vocabulary-larger-than-model",
        )
