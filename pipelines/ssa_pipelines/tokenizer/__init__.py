"""Tokenizers: base.py says what one is, one module per variant, training.py makes a SentencePiece model."""

from ssa_pipelines.tokenizer.base import TOKENIZERS, Tokenizer, cached_tokenizer

__all__ = ["TOKENIZERS", "Tokenizer", "cached_tokenizer"]
