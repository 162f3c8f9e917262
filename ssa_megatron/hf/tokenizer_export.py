"""A run's tokenizer to tokenizer files that AutoTokenizer loads with torch and transformers alone.

The written tokenizer gives the same ids as `ssa_pipelines.Tokenizer` for every text, and text that looks like a mark (`<s>`)
is text. It refuses tokenizers that cannot be converted exactly, and compares ids and text on a battery of texts.
"""

import json
from pathlib import Path

from ssa_megatron.errors import DataProblem
from ssa_pipelines import Tokenizer

SPACE_MARK = "\u2581"

PROBES = (
    "",
    " ",
    "  two  spaces   three ",
    "\n",
    "line\n\n  indented\n\tTabbed\r\nCRLF\n",
    "In the beginning God created the heaven and the earth.",
    "don't   'quote' \u2018curly\u2019 \u201cdouble\u201d \u2014 dash\u2026",
    "1234567890 3.14159 1,000,000 2024-01-01",
    "e\u0301 vs \u00e9; \ufb01 ligature; \u212b; \u1e9b\u0323",
    "\u65e5\u672c\u8a9e\u3000\u4e2d\u6587 \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \U0010ffff",
    "\x00\x01\x7f\u0085\u00a0\u2028\u2029\ufeff\ufffd",
    "<s></s><unk><0x0A><pad> <s> text",
    f"{SPACE_MARK}literal mark{SPACE_MARK}{SPACE_MARK} and {SPACE_MARK} alone",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bababababababababab",
    "def f(x):\n    return {'a': [x ** 2]}  # comment\n",
)


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, max_length: int) -> dict:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    Prompts start with bos, as documents do in training; batches are padded on the left with `pad_id`. Returns `{"bos_id",
    "eos_id", "pad_id", "vocab_size", "texts_compared"}`. Raises TokenizerError for a tokenizer that cannot be converted, and
    DataProblem where the converted one differs.
    """
    from tokenizers import processors

    converted = tokenizer.to_hugging_face()
    bos = tokenizer.special_tokens["bos_token"]
    converted.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    converted.encode_special_tokens = True  # as in training: "<s>" in a text is three characters, never a mark
    compared = check_parity(tokenizer, converted)
    _write_files(converted, tokenizer.special_tokens, folder, max_length)
    ids = {name: getattr(tokenizer, name) for name in ("bos_id", "eos_id", "pad_id", "vocab_size")}
    return {**ids, "texts_compared": compared}


def _write_files(converted, marks: dict[str, str], folder: Path, max_length: int) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **marks,
        "add_bos_token": True,
        "add_eos_token": False,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    converted.save(str(folder / "tokenizer.json"))
    for file, content in (("tokenizer_config.json", config), ("special_tokens_map.json", marks)):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_parity(tokenizer: Tokenizer, converted) -> int:
    """Compare ids and decoded text on the probes and on every converted piece; returns the number of texts."""
    texts = [*PROBES, *tokenizer.conversion_probes()]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        found = converted.encode(text, add_special_tokens=False).ids
        if found != ids or converted.decode(ids, skip_special_tokens=False) != text:
            raise DataProblem(
                f"{tokenizer.path}: the converted tokenizer differs on {text[:80]!r}",
                remedy="train the tokenizer with `ssa tokenizer train` (BPE, byte fallback, identity normalisation)",
                id="tokenizer-conversion-differs",
            )
    return len(texts)
