"""Statistics of a prepared dataset: sizes, ratios, document lengths, and a sample of its text decoded again."""

from pathlib import Path

from ssa_pipelines.shards.dataset import SplitInfo, load_dataset_info
from ssa_pipelines.shards.row_reader import RowReader
from ssa_pipelines.storage.shard_cache import Access
from ssa_pipelines.tokenizer import Tokenizer

_SAMPLE_TOKENS = 200


def stats(location: str | Path, *, access: Access | None = None) -> dict:
    """Rows, tokens, documents and bytes of each split, their ratios, and a decoded sample of its first row.

    "lengths": documents by tokens, marks included, as {"2-4": 3, ...}; a group contains its upper end, not its lower one.
    "padding_share": share of the tokens of all rows that are padding.
    Raises DatasetError or ShardError for a dataset whose record or first shard cannot be read.
    """
    info = load_dataset_info(location, access)
    tokenizer = Tokenizer.load(info.tokenizer_path)
    report: dict = {
        "path": info.location,
        "fingerprint": info.fingerprint,
        "tokenizer_fingerprint": info.tokenizer_fingerprint,
        "vocab_size": info.vocab_size,
        "row_length": info.row_length,
        "token_dtype": info.token_dtype,
        "unigram_entropy": info.unigram_entropy,
        "validation_unigram_cross_entropy": info.validation_unigram_cross_entropy,
        "duplicates": info.duplicates,
        "splits": {},
    }
    for name, split in info.splits.items():
        tokens, _, _ = RowReader(info, name, access).read(0)
        sample = tokenizer.decode(tokens[:_SAMPLE_TOKENS].tolist())
        report["splits"][name] = {**_figures(split), "sample": sample}
    return report


def _figures(split: SplitInfo) -> dict:
    return {
        "rows": split.rows,
        "tokens": split.tokens,
        "padding": split.padding,
        "padding_share": split.padding / (split.tokens + split.padding),
        "documents": split.documents,
        "text_bytes": split.text_bytes,
        "shards": sum(not file.endswith(".json") for file in split.files),
        "disk_bytes": sum(file.bytes for file in split.files.values()),
        "bytes_per_token": split.text_bytes / split.tokens,
        "tokens_per_document": split.tokens / split.documents,
        "documents_per_row": split.documents / split.rows,
        "lengths": {f"{2**k // 2}-{2**k}": count for k, count in enumerate(split.lengths) if count},
    }
