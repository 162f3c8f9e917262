"""The tokenizer gives back every text, trains to the same bytes, and refuses impossible vocabulary sizes with one that works."""

import random
import re
import sys
import time

import pytest
import sentencepiece
from typer.testing import CliRunner

from ssa_megatron import cli
from ssa_pipelines import CorpusError, Tokenizer, TokenizerError, train_tokenizer
from tests.errors import raises

ODD = [
    "",
    " ",
    "  two  spaces  ",
    "\n",
    "\n\n \n",
    "tab\t\r\nreturn",
    "\u2581",
    "a\u2581 \u2581b\u2581\u2581",
    "<s></s><unk><0x41>",
    "\x00nul\x00",
    "e\u0301 é",
    "\ufeff\u200b\u2028\u2029",
    "\ufffd \u2047 ",
    "😀👩‍👩‍👧",
    "\U0010ffff",
    "العربية 中文 हिन्दी",
    "0123456789",
    "ﬁ ½ Ａ",
    "\x7f\x80\x85\xa0",
    "a" * 5000,
]


@pytest.mark.parametrize("text", ODD, ids=ascii)
def test_decoding_gives_back_an_odd_text(tokenizer, text):
    (tokens,) = tokenizer.encode([text])
    assert tokenizer.decode(tokens) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, 0} & set(tokens)


def test_decoding_gives_back_random_texts_of_every_script(tokenizer):
    draw = random.Random(1)
    alphabet = [chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000]
    texts = ["".join(draw.choices(alphabet, k=draw.randrange(60))) for _ in range(500)]
    texts += ["".join(draw.choices("ab \n\t\u2581é😀<s>", k=draw.randrange(60))) for _ in range(500)]
    assert [tokenizer.decode(tokens) for tokens in tokenizer.encode(texts)] == texts


def test_a_very_long_document_encodes_like_its_lines_and_does_not_depend_on_threads(tokenizer, documents):
    text = "\n".join(documents)
    assert len(text) > 1 << 17
    newline = tokenizer.encode(["\n"])[0]
    assert len(newline) == 1
    lines = tokenizer.encode(text.split("\n"), threads=2)
    expected = lines[0] + [token for line in lines[1:] for token in newline + line]
    assert tokenizer.encode([text]) == tokenizer.encode([text], threads=2) == [expected]
    assert tokenizer.decode(expected) == text


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_a_very_long_line_is_cut_before_words_and_encodes_like_them(tmp_path, documents, model_type):
    tokenizer = train_tokenizer(iter(documents), tmp_path / "t.model", vocab_size=600, model_type=model_type)
    words = " ".join(documents).replace("\n", " ").split(" ")
    text = " ".join(words[:30_000]) + "x" * 70_000 + "   \u2581 " + " ".join(words[:9000])
    segments = list(tokenizer._segments(text))
    assert "".join(segments) == text
    assert (
        max(map(len, segments)) <= 1 << 17
    )  # longer than a segment only for the word of 70,000 letters, which cannot be cut
    assert sum(len(segment) > 1 << 16 for segment in segments) <= 1
    assert len(segments) > 4
    (whole,) = tokenizer.encode([text])
    assert tokenizer.encode_long(text).tolist() == whole
    assert tokenizer.decode(whole) == text
    line = " ".join(words[:30_000])
    if model_type == "bpe":  # unigram sums 32-bit scores, and over a whole book their rounding decides ties
        assert tokenizer.encode([line])[0] == tokenizer._processor.encode(line)


def test_a_model_with_pieces_of_several_words_is_given_whole_texts(tmp_path, documents):
    model = tmp_path / "words.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["of the " * 50] * 50), model_prefix=str(model.with_suffix("")), model_type="bpe",
        vocab_size=275, hard_vocab_limit=False, byte_fallback=True, split_by_whitespace=False, add_dummy_prefix=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["\n"], minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer.load(model)
    text = "of the " * 20_000
    assert list(tokenizer._segments(text)) == [text]


def test_bos_and_eos_decode_to_nothing(tokenizer):
    (tokens,) = tokenizer.encode([" text "])
    assert tokenizer.decode([tokenizer.bos_id, *tokens, tokenizer.eos_id]) == " text "


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_training_gives_the_size_asked_for_and_the_same_bytes_twice(tmp_path, documents, model_type):
    a = train_tokenizer(iter(documents), tmp_path / "a" / "a.model", vocab_size=600, model_type=model_type)
    b = train_tokenizer(iter(documents), tmp_path / "b.model", vocab_size=600, model_type=model_type)
    assert a.vocab_size == 600
    assert (a.bos_id, a.eos_id) == (1, 2)
    assert a.fingerprint == b.fingerprint == Tokenizer.load(b.path).fingerprint
    assert [p.name for p in tmp_path.rglob("*.model*")] == ["b.model", "a.model"]
    assert [a.decode(tokens) for tokens in a.encode(ODD)] == ODD


def test_training_reads_sources_as_well(tmp_path):
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 50)
    assert train_tokenizer(tmp_path / "a.txt", tmp_path / "t.model", vocab_size=275).vocab_size == 275


def test_training_samples_evenly_from_a_stream_larger_than_its_budget(tmp_path):
    early, late = "early " * 20, "later " * 20
    stream = (early if n < 5000 else late for n in range(10_000))
    tokenizer = train_tokenizer(stream, tmp_path / "t.model", vocab_size=278, sample_bytes=20_000)
    for word in (" early", " later"):
        assert len(tokenizer.encode([word])[0]) == 1


def test_the_command_line_sets_how_much_is_learnt_from_and_which_characters_get_pieces(tmp_path, documents):
    corpus, out = tmp_path / "corpus.txt", tmp_path / "t.model"
    corpus.write_text("\n".join(documents[:30]) + "\n中\n")  # one character of 100,000

    def train(*options: str) -> Tokenizer:
        command = ["tokenizer", "train", str(corpus), "--out", str(out), "--vocab-size", "400", *options]
        assert CliRunner().invoke(cli.app, command, catch_exceptions=False).exit_code == 0
        return Tokenizer.load(out)

    assert len(train("--character-coverage", "1.0").encode(["中"])[0]) == 1
    everything = train()
    assert len(everything.encode(["中"])[0]) == 3  # spelt in bytes
    a, again, other = (train("--sample-bytes", "20000", "--seed", seed) for seed in "112")
    assert a.fingerprint == again.fingerprint
    assert len({a.fingerprint, other.fingerprint, everything.fingerprint}) == 3


@pytest.mark.parametrize("value", ["0", "-5"])
def test_a_sample_of_nothing_is_refused_before_the_corpus_is_read(tmp_path, value):
    command = ["tokenizer", "train", str(tmp_path), "--out", str(tmp_path / "t"), "--vocab-size", "300"]
    with raises(TokenizerError, "sample-bytes", f"sample_bytes {value}"):
        CliRunner().invoke(cli.app, [*command, "--sample-bytes", value], catch_exceptions=False)


@pytest.mark.parametrize("value", ["0.9", "1.5", "nan"])
def test_a_character_coverage_that_sentencepiece_refuses_is_named_with_its_range(tmp_path, value):
    command = ["tokenizer", "train", str(tmp_path), "--out", str(tmp_path / "t"), "--vocab-size", "300"]
    with raises(TokenizerError, "character-coverage", f"character_coverage {value}", "0.98..1"):
        CliRunner().invoke(cli.app, [*command, "--character-coverage", value], catch_exceptions=False)


def test_training_learns_from_lines_longer_than_sentencepiece_accepts(tmp_path):
    one_line = "unbroken " * 5000 + "x" * 9000
    tokenizer = train_tokenizer(iter([one_line]), tmp_path / "t.model", vocab_size=280)
    assert len(tokenizer.encode([" unbroken"])[0]) == 1


def test_training_on_a_book_in_one_line_takes_seconds(tmp_path, documents):
    line = " ".join(documents).replace("\n", " ") * 20  # 8 MB; regression: the time grew with the square of the length
    began = time.monotonic()
    train_tokenizer(iter([line, "é" * 1999 + "e", "é" * 2001]), tmp_path / "t.model", vocab_size=400)
    assert time.monotonic() - began < 15


def test_impossible_vocabulary_sizes_are_refused_with_one_that_works(tmp_path, documents):
    with raises(TokenizerError, "vocab-size-too-large", "vocab_size 90000") as caught:
        train_tokenizer(iter(documents), tmp_path / "t.model", vocab_size=90_000)
    possible = int(re.findall(r"\d+", caught.value.remedy)[0])
    assert train_tokenizer(iter(documents), tmp_path / "t.model", vocab_size=possible).vocab_size == possible
    with raises(TokenizerError, "vocab-size-too-small", "vocab_size 100"):
        train_tokenizer(iter(documents), tmp_path / "u.model", vocab_size=100)
    assert not (tmp_path / "u.model").exists()


def test_unusable_arguments_and_files_are_refused(tmp_path, documents):
    with raises(TokenizerError, "unknown-model-type", "'word'"):
        train_tokenizer(iter(documents), tmp_path / "t.model", vocab_size=600, model_type="word")
    with raises(CorpusError, "tokenizer-corpus-empty"):
        train_tokenizer(iter([" ", "\n"]), tmp_path / "t.model", vocab_size=600)
    with raises(TokenizerError, "tokenizer-unreadable", "absent.model"):
        Tokenizer.load(tmp_path / "absent.model")
    (tmp_path / "damaged.model").write_bytes(b"\x0a\xff\xff\xff\xff\x0f")
    with raises(TokenizerError, "not-a-sentencepiece-model", "damaged.model"):
        Tokenizer.load(tmp_path / "damaged.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with raises(TokenizerError, "unknown-tokenizer-format", "bad.model", "tokenizer.json", "tokenizer.model"):
        Tokenizer.load(tmp_path / "bad.model")


@pytest.mark.parametrize(
    ("options", "id"),
    [
        ({"byte_fallback": False}, "tokenizer-loses-text"),
        ({"normalization_rule_name": "nmt_nfkc", "byte_fallback": True}, "tokenizer-loses-text"),
        ({"byte_fallback": True, "eos_id": -1}, "tokenizer-without-marks"),
    ],
)
def test_a_model_that_loses_text_or_lacks_marks_is_refused(tmp_path, documents, options, id):
    path = tmp_path / "lossy.model"
    lines = (line for text in documents[:60] for line in text.split("\n") if len(line) < 4000)
    with path.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=out, vocab_size=400, minloglevel=2, model_type="bpe", **options
        )
    with raises(TokenizerError, id, path):
        Tokenizer.load(path)


def test_ids_outside_the_vocabulary_and_lone_surrogates_are_refused(tokenizer):
    with raises(TokenizerError, "token-outside-vocabulary", "0..700"):
        tokenizer.decode([701])
    with raises(TokenizerError, "lone-surrogate"):
        tokenizer.encode(["\ud800"])
    with pytest.raises(TypeError, match="a list of texts"):
        tokenizer.encode("text")


def test_inspecting_reports_identity_and_statistics(tokenizer, documents):
    report = tokenizer.inspect(documents[:20])
    assert report["fingerprint"] == tokenizer.fingerprint
    assert report["vocab_size"] == 701
    assert report["sample_tokens"] == sum(map(len, tokenizer.encode(documents[:20])))
    assert 1 < report["bytes_per_token"] < 8
    assert 0 <= report["byte_piece_share"] < 0.2
    assert tokenizer.inspect(["the end"])["character_coverage"] == 1.0
    assert tokenizer.inspect(["the 中 end"])["character_coverage"] == pytest.approx(8 / 9)  # spelt in bytes
    assert report["odd_pieces"] == []
