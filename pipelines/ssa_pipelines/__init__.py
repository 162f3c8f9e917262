"""Text -> tokenizer -> MDS shards -> micro-batches. Everything public is importable from here.

The modules load on first use, because streaming and torch take seconds to import and most commands need neither. This
package imports nothing of the project's other packages.
"""

import importlib

_HOME = {
    "ssa_pipelines.errors": (
        "DataError",
        "CorpusError",
        "TokenizerError",
        "DatasetError",
        "DatasetMismatch",
        "ShardError",
    ),
    "ssa_pipelines.corpus.sources": ("KING_JAMES",),
    "ssa_pipelines.corpus.documents": ("iter_documents",),
    "ssa_pipelines.corpus.king_james": ("demo_documents",),
    "ssa_pipelines.tokenizer.sentencepiece_tokenizer": ("Tokenizer", "train_tokenizer"),
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


def __getattr__(name: str):
    if name in _MODULE_OF:
        return getattr(importlib.import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'pipelines' has no attribute {name!r}")
