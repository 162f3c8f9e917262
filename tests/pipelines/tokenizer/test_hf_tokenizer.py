"""A Hugging Face tokenizer.json gives every text back, has document marks, and loads again from a dataset."""

import json

import pytest
import tokenizers

import ssa_pipelines
from ssa_pipelines import Tokenizer, TokenizerError
from tests.errors import raises
from tests.pipelines.support import SETTINGS, stream, take
from tests.pipelines.tokenizer.test_sentencepiece_tokenizer import ODD


def byte_level(documents, *, special=("<|begin_of_text|>", "<|end_of_text|>"), normalizer=None):
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    if normalizer:
        made.normalizer = normalizer
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(documents, trainer)
    return made


@pytest.fixture(scope="module")
def path(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    byte_level(documents).save(str(path))
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.load(path)


@pytest.mark.parametrize("text", [*ODD, "<|end_of_text|> is text"], ids=ascii)
def test_decoding_gives_back_an_odd_text(tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokens)


def test_marks_come_from_the_usual_names_or_from_the_config_next_to_it(path, tmp_path, documents):
    assert (Tokenizer.load(path).bos_id, Tokenizer.load(path).eos_id) == (0, 1)
    byte_level(documents, special=("<a>", "<b>", "</s>")).save(str(tmp_path / "tokenizer.json"))
    one_mark = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (one_mark.bos_id, one_mark.eos_id) == (2, 2)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<b>", "eos_token": {"content": "<a>"}}))
    configured = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (configured.bos_id, configured.eos_id) == (1, 0)
    assert configured.fingerprint != one_mark.fingerprint  # other marks make other rows


def test_rows_made_with_it_decode_with_the_datasets_own_copy(tmp_path, tokenizer, documents):
    ssa_pipelines.prepare(iter(documents), tokenizer, tmp_path / "data", **SETTINGS)
    info = ssa_pipelines.load_dataset_info(tmp_path / "data")
    again = Tokenizer.load(info.tokenizer_path)
    assert again.fingerprint == tokenizer.fingerprint == info.tokenizer_fingerprint
    assert (again.bos_id, again.eos_id, info.bos_id, info.eos_id) == (0, 1, 0, 1)
    row = take(stream(tmp_path / "data", shuffle=False, micro=1, batch=1), 1)[0].tokens[0].tolist()
    assert row[0] == tokenizer.bos_id
    assert documents[0].startswith(again.decode(row)) or documents[1].startswith(again.decode(row))
    ssa_pipelines.verify(tmp_path / "data")


@pytest.mark.parametrize(
    ("made", "id"),
    [
        (lambda d: byte_level(d, special=("<a>",)), "tokenizer-without-eos"),
        (lambda d: byte_level(d, normalizer=tokenizers.normalizers.Lowercase()), "tokenizer-loses-text"),
    ],
)
def test_a_tokenizer_that_loses_text_or_has_no_mark_is_refused(tmp_path, documents, made, id):
    made([*documents, "ABC"]).save(str(tmp_path / "tokenizer.json"))
    if id == "tokenizer-loses-text":
        text = (tmp_path / "tokenizer.json").read_text()
        (tmp_path / "tokenizer.json").write_text(text.replace('"Lowercase"', '"NFKD"'))
    with raises(TokenizerError, id, tmp_path):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with raises(TokenizerError, "not-a-tokenizer-json", "tokenizer.json"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_inspecting_reports_coverage_and_odd_pieces(tokenizer, documents):
    report = tokenizer.inspect(documents[:20])
    assert report["kind"] == "HuggingFaceTokenizer"
    assert report["character_coverage"] == 1.0  # every byte is a piece
    assert report["sample_tokens"] == sum(map(len, tokenizer.encode(documents[:20])))
