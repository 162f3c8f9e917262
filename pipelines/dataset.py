"""A prepared dataset's description: the typed contents of `dataset.json`, and the checks every reader starts with.

The file carries its own sha256 (the dataset's fingerprint) and, through the sha256 of every shard and index, pins every
byte of the dataset; a saved data position names this fingerprint. It refuses folders that are incomplete or edited, and
recipes whose tokenizer, vocabulary or row length differ from the data's.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pipelines.errors import DatasetError, DatasetMismatch

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
    """One split. `tokens` counts bos and eos, not padding; `files` are those of the split's folder, by name.

    lengths: documents by length in tokens, marks included: entry k counts those of 2**(k-1) < tokens <= 2**k.
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
    """What `dataset.json` says.

    unigram_entropy: entropy of the training tokens, bos and padding left out, in nats a token: the loss of a model that
        has learnt the frequencies and nothing else.
    validation_unigram_cross_entropy: of the validation tokens under the training frequencies, each count plus one so
        that an unseen token costs something finite; None without a validation split.
    duplicates: documents left out because an equal one came before, in this source or one prepared with it.
    files: those beside the splits: the tokenizer, and records.json, [[file of text, number of records], ...].
    inputs: what the dataset was made from and how; equal inputs give equal bytes.
    fingerprint: sha256 over everything else here.
    """

    path: Path
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

    def split(self, name: str) -> SplitInfo:
        """The split `name`. Raises DatasetError naming the splits there are."""
        if name not in self.splits:
            remedy = "prepare with a validation_fraction above 0" if name == "validation" else "name one of these"
            raise DatasetError(f"{self.path}: no split {name!r}, only {', '.join(self.splits)}", remedy=remedy)
        return self.splits[name]


def to_json(info: DatasetInfo) -> dict:
    """The contents of `dataset.json` as plain values."""
    record = {"format": FORMAT, **asdict(info)}
    del record["path"]
    return record


def with_fingerprint(record: dict) -> dict:
    """`record` with its `fingerprint` computed over all other entries."""
    record = {key: value for key, value in record.items() if key != "fingerprint"}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return {**record, "fingerprint": hashlib.sha256(text.encode()).hexdigest()}


def load_dataset_info(path: str | Path) -> DatasetInfo:
    """Reads `path/dataset.json`.

    Raises DatasetError if the folder is no complete dataset, is of another format, or the file was altered.
    """
    path = Path(path)
    file = path / FILE_NAME
    if not file.is_file():
        raise DatasetError(
            f"{path}: not a prepared dataset ({FILE_NAME} is missing)", remedy="prepare it first, or correct the path"
        )
    again = "restore the file, or prepare the dataset again"
    try:
        record = json.loads(file.read_bytes())
        if record["format"] != FORMAT:
            raise DatasetError(
                f"{file}: format {record['format']}, this program reads {FORMAT}", remedy="prepare the dataset again"
            )
        if with_fingerprint(record)["fingerprint"] != record["fingerprint"]:
            raise DatasetError(f"{file}: altered since it was written (its fingerprint does not match)", remedy=again)
        del record["format"]
        splits = {
            name: SplitInfo(**{**split, "files": {f: StoredFile(**v) for f, v in split["files"].items()}})
            for name, split in record.pop("splits").items()
        }
        files = {name: StoredFile(**file) for name, file in record.pop("files").items()}
        return DatasetInfo(path=path, splits=splits, files=files, **record)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{file}: damaged ({error})", remedy=again) from error


def check_compatible(info: DatasetInfo, *, tokenizer_fingerprint: str, vocab_size: int, row_length: int) -> None:
    """Raises DatasetMismatch, with both values, unless a model can train on this dataset.

    tokenizer_fingerprint and row_length must be the dataset's; `vocab_size`, the rows of the model's embedding, may be
    larger than its tokenizer, never smaller.
    """
    remedy = "prepare the dataset with this recipe's tokenizer and row length, or name the dataset that fits"
    for field, wanted in {"tokenizer_fingerprint": tokenizer_fingerprint, "row_length": row_length}.items():
        found = getattr(info, field)
        if found != wanted:
            raise DatasetMismatch(
                f"{info.path}: {field} is {found} in the dataset, {wanted} in the recipe", remedy=remedy
            )
    if info.vocab_size > vocab_size:
        raise DatasetMismatch(
            f"{info.path}: vocab_size is {info.vocab_size} in the dataset's tokenizer, only {vocab_size} in the recipe's model",
            remedy="raise model.vocab_size, or train a smaller tokenizer",
        )


def stats(path: str | Path) -> dict:
    """Figures for people, from `dataset.json` alone: rows, tokens, documents, bytes of each split, and their ratios."""
    info = load_dataset_info(path)
    report = {
        "path": str(info.path),
        "fingerprint": info.fingerprint,
        "tokenizer_fingerprint": info.tokenizer_fingerprint,
        "vocab_size": info.vocab_size,
        "row_length": info.row_length,
        "token_dtype": info.token_dtype,
        "unigram_entropy": info.unigram_entropy,
        "validation_unigram_cross_entropy": info.validation_unigram_cross_entropy,
        "splits": {},
    }
    for name, split in info.splits.items():
        report["splits"][name] = {
            "rows": split.rows,
            "tokens": split.tokens,
            "padding": split.padding,
            "documents": split.documents,
            "text_bytes": split.text_bytes,
            "shards": sum(not file.endswith(".json") for file in split.files),
            "disk_bytes": sum(file.bytes for file in split.files.values()),
            "bytes_per_token": split.text_bytes / split.tokens,
            "tokens_per_document": split.tokens / split.documents,
            "documents_per_row": split.documents / split.rows,
        }
    return report
