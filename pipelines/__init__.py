"""Text -> tokenizer -> MDS shards -> micro-batches. Everything public is importable from here.

The modules load on first use, because streaming and torch take seconds to import and most commands need neither. This
package imports nothing of the project's other packages.
"""

import importlib

_HOME = {
    "pipelines.errors": (
        "DataError",
        "CorpusError",
        "TokenizerError",
        "DatasetError",
        "DatasetMismatch",
        "ShardError",
    ),
    "pipelines.sources": ("KING_JAMES",),
    "pipelines.documents": ("iter_documents",),
    "pipelines.king_james": ("demo_documents",),
    "pipelines.tokenizer": ("Tokenizer", "train_tokenizer"),
    "pipelines.packing": ("pack", "PackedRow", "doc_starts"),
    "pipelines.preparation": ("prepare",),
    "pipelines.verification": ("verify",),
    "pipelines.dataset": ("DatasetInfo", "load_dataset_info", "check_compatible"),
    "pipelines.statistics": ("stats",),
    "pipelines.cache": ("Access",),
    "pipelines.mixture": ("Phase",),
    "pipelines.rows": ("open_sources",),
    "pipelines.stream": ("Rows", "TrainStream", "evaluation_rows"),
    "pipelines.ledger": ("read_ledger",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
