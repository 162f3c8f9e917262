"""Sources become documents in a fixed order, and anything unreadable is named with its file and line."""

import ast
import gzip
import json

import pytest
import zstd

from pipelines import KING_JAMES, Corpus, CorpusError, demo_documents, iter_documents
from pipelines.king_james import king_james_file


def write_jsonl(path, *texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "id": 1}) + "\n" for text in texts))
    return path


def test_a_jsonl_file_yields_one_document_a_line_and_skips_blank_ones(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "one\\ntwo"}\n\n{"text": "  "}\n{"text": "ünï"}')
    assert list(iter_documents(path)) == ["one\ntwo", "ünï"]


def test_another_field_can_hold_the_text(tmp_path):
    assert list(iter_documents(write_jsonl(tmp_path / "a.jsonl", "x", field="body"), text_field="body")) == ["x"]


def test_a_text_file_is_one_document_or_one_for_each_blank_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffa\nb\n\n\n  c\n \nd")
    assert list(iter_documents(path)) == ["a\nb\n\n\n  c\n \nd"]
    assert list(iter_documents(path, blank_line_documents=True)) == ["a\nb", "  c", "d"]


def test_a_folder_is_read_recursively_in_name_order_without_hidden_or_foreign_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.text", "picture.png", ".git/d.txt"):
        (tmp_path / name).write_text(name)
    assert list(iter_documents(tmp_path)) == ["a.md", "b.txt", "sub/c.text"]
    assert list(iter_documents(str(tmp_path / "*.txt"))) == ["b.txt"]
    assert list(iter_documents([tmp_path / "b.txt", tmp_path / "a.md"])) == ["b.txt", "a.md"]


def test_compressed_files_read_like_plain_ones(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", "one", "two").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(plain))
    assert list(iter_documents(tmp_path)) == ["one", "two"] * 3


def test_progress_reaches_the_bytes_on_disk_and_a_corpus_can_be_read_twice(tmp_path):
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(write_jsonl(tmp_path / "a.jsonl", "one", "two").read_bytes()))
    corpus = Corpus(tmp_path)
    assert list(corpus) == list(corpus) == ["one", "two"] * 2
    assert corpus.bytes_read == corpus.total_bytes == sum(p.stat().st_size for p in tmp_path.iterdir())


BAD_CONTENTS = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl, line 2: no field 'text' (fields ['body'])"),
    ("a.jsonl", b"[1]\n", "a.jsonl, line 1: no field 'text' (list)"),
    ("a.jsonl", b'{"text": 7}\n', "a.jsonl, line 1: field 'text' is int"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: field 'text' holds half of a surrogate pair"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', "a.jsonl, line 3: byte 0xff is not valid UTF-8"),
    ("a.txt", b"fine\nfine\n\xe9t\xe9", "a.txt, line 3: byte 0xe9 is not valid UTF-8"),
    ("a.txt", b" \n", "not one document with text in it"),
    ("a.jsonl", b"", "not one document with text in it"),
    ("a.txt.gz", gzip.compress(b"text" * 999)[:-9], "a.txt.gz: cannot be read"),
    ("a.txt.gz", b"no gzip", "a.txt.gz: cannot be read"),
    ("a.txt.zst", b"no zstd", "a.txt.zst: cannot be decompressed"),
]


@pytest.mark.parametrize(("name", "data", "message"), BAD_CONTENTS, ids=[m for _, _, m in BAD_CONTENTS])
def test_bad_contents_are_refused_with_file_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError) as caught:
        list(iter_documents(tmp_path / name))
    assert message in caught.value.problem
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.txt", "'nowhere.txt': no such file, folder or match"),
        ("*.none", "'*.none': no such file, folder or match"),
        ("s3://bucket/key", "'s3://bucket/key': remote text is not read"),
        ("package:other", "'package:other': no such packaged corpus"),
        ("The text itself. " * 40, "not a path"),
        ([], "no source of text was given"),
    ],
)
def test_a_source_that_is_none_is_refused_at_once(source, message):
    with pytest.raises(CorpusError) as caught:
        Corpus(source)
    assert message in caught.value.problem
    assert caught.value.remedy


def test_a_folder_without_text_and_a_file_of_another_kind_are_refused(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(CorpusError, match="a folder without text files"):
        Corpus(tmp_path)
    with pytest.raises(CorpusError, match=r"unknown kind of file '\.csv'"):
        Corpus(tmp_path / "table.csv")


def test_the_king_james_bible_is_1189_clean_chapters_that_lose_no_word():
    chapters = list(iter_documents(KING_JAMES))
    assert chapters == list(demo_documents())
    assert len(chapters) == 1189
    assert chapters[0].startswith("Genesis 1\nIn the beginning God created the heaven and the earth. And the earth was")
    assert chapters[478 + 22].startswith("Psalms 23\n")
    assert chapters[-1].startswith("Revelation 22\n")
    assert chapters[-1].endswith("be with you all. Amen.")
    assert not any(mark in chapter for chapter in chapters for mark in ("[", "]", "  ", "\n\n"))
    strings = (n.value for n in ast.walk(ast.parse(king_james_file().read_text())) if isinstance(n, ast.Constant))
    source = max((s for s in strings if isinstance(s, str)), key=len)
    text = "".join(chapter.split("\n", 1)[1] for chapter in chapters)
    assert "".join(text.split()) == "".join(source.replace("[", "").replace("]", "").split())
