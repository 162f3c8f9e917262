"""SentencePiece BPE model to tokenizer files that AutoTokenizer loads with torch and transformers alone.

The converted tokenizer gives the same ids as `ssa_pipelines.Tokenizer` for every text: a space stays a space in the pieces,
so that a literal U+2581 in a text is spelt in bytes there as here, and text that looks like a mark (`<s>`) is text. It
refuses what it cannot convert exactly (unigram, normalisation, dummy prefix, no byte fallback) and checks itself on a
battery of texts.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

import ssa_pipelines
from ssa_megatron.errors import DataProblem

SPACE_MARK = "\u2581"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # SentencePiece.Type of sentencepiece_model.proto
BPE = 2  # TrainerSpec.ModelType

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


# ------------------------------------------------------------------------------------- reading the model's protobuf
def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message; a varint as int, everything else as bytes.

    Thirty lines instead of a dependency: `sentencepiece_model_pb2` refuses some protobuf releases.
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        match tag & 7:
            case 0:
                yield tag >> 3, varint()
                continue
            case 1:
                size = 8
            case 2:
                size = varint()
            case 5:
                size = 4
            case wire:
                raise ValueError(f"wire type {wire}")
        yield tag >> 3, message[at : at + size]
        at += size


def read_model(path: Path) -> tuple[list[tuple[str, float, int]], dict, dict]:
    """Pieces (text, score, type), trainer and normalizer settings of a SentencePiece model, defaults filled in."""
    pieces: list[tuple[str, float, int]] = []
    trainer = {"model_type": 1, "byte_fallback": 0, "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "suffix": 0}
    normalizer = {"charsmap": b"", "add_dummy_prefix": 1, "remove_extra_whitespaces": 1, "escape_whitespaces": 1}
    names = {
        2: (trainer, {3: "model_type", 24: "suffix", 35: "byte_fallback", 40: "unk_id", 41: "bos_id", 42: "eos_id", 43:
        "pad_id"}), 3: (normalizer, {2: "charsmap", 3: "add_dummy_prefix", 4: "remove_extra_whitespaces", 5:
        "escape_whitespaces"}),
    }  # fmt: skip
    try:
        for number, value in fields(path.read_bytes()):
            if number == 1:
                piece = dict(fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece.get(3, NORMAL)))
            elif number in names:
                settings, known = names[number]
                for inner, setting in fields(value):
                    if inner in known:  # ids are int32: negative ones come as 64-bit two's complement
                        signed = isinstance(setting, int) and setting >= 1 << 63
                        settings[known[inner]] = setting - (1 << 64) if signed else setting
    except OSError as error:
        raise DataProblem(
            f"{path}: the tokenizer model cannot be read ({error.strerror})", id="tokenizer-unreadable"
        ) from error
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise DataProblem(
            f"{path}: not a SentencePiece model", remedy="name the run's own tokenizer model", id="not-a-tokenizer"
        ) from error
    if not pieces:
        raise DataProblem(
            f"{path}: a SentencePiece model without pieces",
            remedy="name the run's own tokenizer model",
            id="tokenizer-without-pieces",
        )
    return pieces, trainer, normalizer


# ---------------------------------------------------------------------------------------------------------- conversion
def _refuse(path: Path, reason: str):
    raise DataProblem(
        f"{path}: cannot be converted exactly: {reason}",
        remedy="train the tokenizer with `ssa tokenizer train` (BPE, byte fallback, identity normalisation)",
        id="tokenizer-not-convertible",
    )


def _merges(pieces: list[tuple[str, float, int]]) -> list[list[str]]:
    """Pairs in the order SentencePiece joins them: by the joined piece's score; then the longer left part first."""
    score = {text: score for text, score, kind in pieces if kind == NORMAL}
    found = []
    for text, value in score.items():
        for cut in range(1, len(text)):
            if text[:cut] in score and text[cut:] in score:
                found.append((-value, -cut, text[:cut], text[cut:]))
    return [[left, right] for _, _, left, right in sorted(found)]


def convert(model_path: str | Path):
    """A `tokenizers.Tokenizer` with the SentencePiece model's ids; raises DataProblem where it could not be exact."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    path = Path(model_path)
    pieces, trainer, normalizer = read_model(path)
    if trainer["model_type"] != BPE:
        _refuse(path, "the model is not BPE")
    if not trainer["byte_fallback"]:
        _refuse(path, "unknown characters are not spelt in bytes")
    if normalizer["charsmap"] or normalizer["add_dummy_prefix"] or normalizer["remove_extra_whitespaces"]:
        _refuse(path, "it normalises text, adds a dummy prefix or drops spaces")
    if not normalizer["escape_whitespaces"] or trainer["suffix"]:
        _refuse(path, "spaces are not ordinary characters at the front of pieces")
    if trainer["bos_id"] < 0 or trainer["eos_id"] < 0:
        _refuse(path, "it has no document marks (bos, eos)")
    spaced = [(t.replace(SPACE_MARK, " ") if kind == NORMAL else t, s, kind) for t, s, kind in pieces]
    vocabulary = {text: i for i, (text, _, _) in enumerate(spaced)}
    if len(vocabulary) != len(spaced):
        _refuse(path, "two pieces have the same text")
    marks = {i: text for i, (text, _, kind) in enumerate(spaced) if kind in (CONTROL, UNKNOWN)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[tuple(pair) for pair in _merges(spaced)],
            unk_token=marks[trainer["unk_id"]],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in marks.values()])
    own = [text for text, _, kind in spaced if kind == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in own])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    bos = marks[trainer["bos_id"]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, trainer["bos_id"])]
    )
    tokenizer.encode_special_tokens = True  # as in training: "<s>" in a text is three characters, never a mark
    return tokenizer


def write_tokenizer(model_path: str | Path, folder: Path, *, max_length: int) -> dict:
    """tokenizer.json, tokenizer_config.json and special_tokens_map.json into `folder`.

    Prompts start with bos, as documents do in training; batches are padded on the left with eos. Returns `{"bos_id",
    "eos_id", "pad_id", "vocab_size", "texts_compared"}`. Raises DataProblem where the files would not tokenize exactly
    like the model.
    """
    path = Path(model_path)
    if path.suffix == ".json":
        return _write_hugging_face(path, folder, max_length)
    tokenizer = convert(path)
    pieces, trainer, _ = read_model(path)
    compared = check_parity(path, tokenizer)
    name = {key: pieces[trainer[f"{key}_id"]][0] for key in ("unk", "bos", "eos")}
    pad_id = trainer["pad_id"] if trainer["pad_id"] >= 0 else trainer["eos_id"]
    marks = {f"{key}_token": text for key, text in name.items()} | {"pad_token": pieces[pad_id][0]}
    _write_files(tokenizer, marks, folder, max_length)
    ids = {key: trainer[key] for key in ("bos_id", "eos_id")}
    return {**ids, "pad_id": pad_id, "vocab_size": len(pieces), "texts_compared": compared}


def _write_files(tokenizer, marks: dict[str, str], folder: Path, max_length: int) -> None:
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
    tokenizer.save(str(folder / "tokenizer.json"))
    for file, content in (("tokenizer_config.json", config), ("special_tokens_map.json", marks)):
        (folder / file).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_hugging_face(path: Path, folder: Path, max_length: int) -> dict:
    """A run's own tokenizer.json, as it is but for the bos in front; compared on the probes."""
    from tokenizers import Tokenizer, processors

    own = ssa_pipelines.Tokenizer.load(path)
    tokenizer = Tokenizer.from_file(str(path))
    bos, eos = tokenizer.id_to_token(own.bos_id), tokenizer.id_to_token(own.eos_id)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, own.bos_id)]
    )
    tokenizer.encode_special_tokens = True
    for text in PROBES:
        if tokenizer.encode(text).ids != [own.bos_id, *own.encode([text])[0]]:
            _refuse(path, f"the written tokenizer differs on {text[:80]!r}")
    _write_files(tokenizer, {"bos_token": bos, "eos_token": eos, "pad_token": eos}, folder, max_length)
    sizes = {"vocab_size": own.vocab_size, "texts_compared": len(PROBES)}
    return {"bos_id": own.bos_id, "eos_id": own.eos_id, "pad_id": own.eos_id, **sizes}


def check_parity(model_path: Path, tokenizer) -> int:
    """Compare ids and decoded text with SentencePiece on the probes and on every piece's own text; returns how many."""
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_path))
    plain = [reference.id_to_piece(i) for i in range(reference.vocab_size())]
    pieces = [text.replace(SPACE_MARK, " ") for i, text in enumerate(plain) if not reference.is_byte(i)]
    joined = ["".join(pieces[i : i + 64]) for i in range(0, len(pieces), 64)]
    texts = [*PROBES, *joined]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if (ids != expected_ids(reference, text)) or tokenizer.decode(ids, skip_special_tokens=False) != text:
            _refuse(model_path, f"the converted tokenizer differs on {text[:80]!r}")
    return len(texts)


def expected_ids(reference: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """What training's tokenizer gives: SentencePiece's ids, with a literal space mark spelt in bytes."""
    mark = [reference.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    ids: list[int] = []
    for i, part in enumerate(text.split(SPACE_MARK)):
        ids += ([] if i == 0 else mark) + reference.encode(part)
    return ids
