"""Text -> tokenizer -> MDS shards -> micro-batches. Everything public is importable from here.

Modules load on first use: streaming and torch take seconds to import and most commands need neither. This package does not
import the project's other packages.
"""

import importlib
from typing import Any

_HOME = {
    "ssa_pipelines.errors": (
        "DataError",
        "CorpusError",
        "TokenizerError",
        "DatasetError",
        "DatasetMismatch",
        "ShardError",
    ),
    "ssa_pipelines.corpus.documents": ("iter_documents",),
    "ssa_pipelines.corpus.formats.king_james": ("KING_JAMES", "demo_documents"),
    "ssa_pipelines.tokenizer": ("Tokenizer",),
    "ssa_pipelines.tokenizer.training": ("train_tokenizer",),
    "ssa_pipelines.shards.packing": ("pack", "PackedRow", "doc_starts"),
    "ssa_pipelines.shards.preparation": ("prepare",),
    "ssa_pipelines.shards.verification": ("verify",),
    "ssa_pipelines.shards.dataset": ("DatasetInfo", "load_dataset_info", "check_compatible"),
    "ssa_pipelines.shards.statistics": ("stats",),
    "ssa_pipelines.storage.shard_cache": ("Access",),
    "ssa_pipelines.stream.mixture": ("Phase",),
    "ssa_pipelines.stream.run_rows": ("open_sources",),
    "ssa_pipelines.stream.train_stream": ("Rows", "TrainStream", "evaluation_rows"),
    "ssa_pipelines.stream.ledger": ("read_ledger",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
