"""Sources become documents in a fixed order, and anything unreadable is named with its file and line."""

import ast
import gzip
import json

import pyarrow as pa
import pytest
from backports import zstd
from pyarrow import parquet

from ssa_pipelines import KING_JAMES, CorpusError, demo_documents, iter_documents
from ssa_pipelines.corpus.formats.base import ReadOptions
from ssa_pipelines.corpus.formats.king_james import king_james_file
from ssa_pipelines.corpus.sources import input_files, named_sources
from tests.errors import raises


def write_jsonl(path, *texts, field="text"):
    path.write_text("".join(json.dumps({field: text, "id": 1}) + "\n" for text in texts))
    return path


def test_a_jsonl_file_yields_one_document_per_line_and_skips_blank_ones(tmp_path):
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


def test_text_behind_links_is_read_and_a_broken_link_is_an_error(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("here")
    (tmp_path / "elsewhere" / "b.txt").write_text("there")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "corpus")  # a walk that follows links must still end
    assert list(iter_documents(tmp_path / "corpus")) == ["here", "there"]
    (tmp_path / "elsewhere" / "c.txt").symlink_to(tmp_path / "removed.txt")
    for given in (tmp_path / "corpus", tmp_path / "elsewhere" / "*.txt"):
        with raises(CorpusError, "broken-link", "c.txt", "removed.txt"):
            iter_documents(given)


def test_a_pattern_that_matches_folders_reads_what_is_in_them_once(tmp_path):
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text("a")
    (tmp_path / "corpus" / "sub" / "b.txt").write_text("b")
    for pattern in ("corpus/*", "corpus/**", "cor*"):
        assert list(iter_documents(str(tmp_path / pattern))) == ["a", "b"], pattern


@pytest.mark.parametrize("name", ["b.jsonl.bz2", "b.txt.xz", "b.parquet.gz", "b.MD.ZIP"])
def test_text_in_an_unsupported_compression_is_refused_and_not_left_out(tmp_path, name, s3):
    write_jsonl(tmp_path / "a.jsonl", "one")
    (tmp_path / name).write_bytes(b"x")
    s3.put("text/a.jsonl", b'{"text": "one"}')
    s3.put(f"text/{name}", b"x")
    for given in (tmp_path, tmp_path / "*", tmp_path / name, "s3://bucket/text/"):
        with raises(CorpusError, "unsupported-compression", name):
            iter_documents(given)


def test_files_of_one_name_in_different_folders_get_distinct_names(tmp_path):
    for language in ("en", "de"):
        (tmp_path / language).mkdir()
        (tmp_path / language / "part-0.txt").write_text(language)
    files = [tmp_path / "en" / "part-0.txt", tmp_path / "de" / "part-0.txt"]
    for given in (files, [tmp_path / "en", tmp_path / "de"]):
        assert [file.name for file in input_files(given)] == ["en/part-0.txt", "de/part-0.txt"]
    assert [file.name for file in input_files([files[0], files[0]])] == ["part-0.txt"] * 2


def test_compressed_files_read_like_plain_ones(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", "one", "two").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain))
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(plain))
    assert list(iter_documents(tmp_path)) == ["one", "two"] * 3


def write_parquet(path, *texts, column="text", group=2):
    parquet.write_table(pa.table({"id": list(range(len(texts))), column: list(texts)}), path, row_group_size=group)
    return path


def test_a_parquet_file_yields_one_document_per_row_and_skips_blank_ones(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", "one\ntwo", None, " ", "ünï", "", "last")
    assert list(iter_documents(path)) == ["one\ntwo", "ünï", "last"]
    assert list(iter_documents(write_parquet(tmp_path / "b.parquet", "x", column="body"), text_field="body")) == ["x"]


def test_compressed_files_of_several_frames_are_read_to_the_end(tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", "one", "two").read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain) * 2)
    (tmp_path / "c.jsonl.zst").write_bytes(zstd.compress(plain) * 2)
    assert list(iter_documents([tmp_path / "b.jsonl.gz", tmp_path / "c.jsonl.zst"])) == ["one", "two"] * 4


TEXT = "first\n\n\n second line\nthird\n \n\nfourth é😀\n\nfifth\n" * 3 + "\n\nlast"


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "a.parquet"])
@pytest.mark.parametrize("stride", [1, 2, 3, 7, 64])
def test_a_file_cut_anywhere_yields_each_record_once_and_in_order(tmp_path, name, stride):
    texts = ["a", "", "bb é", "  ", "c" * 40, "d\n\ne", "f"] * 2
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, *texts, group=3)
    else:
        plain = TEXT if "txt" in name else "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
        pack = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
        path.write_bytes(pack(plain.encode()))
    [file], options = input_files(path), ReadOptions(blank_line_documents=True)
    whole = list(file.records(options))
    assert [position for position, _ in whole] == sorted(position for position, _ in whole)
    end = whole[-1][0] + 1
    assert [r for begin in range(0, end, stride) for r in file.records(options, begin, begin + stride)] == whole


def test_a_range_of_a_file_without_blank_lines_is_not_read_beyond_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("a line\n" * 100 + "\n" + "the rest belongs to another range: \xff")
    data = (tmp_path / "a.txt").read_bytes().replace("\xff".encode(), b"\xff")  # reading that far fails
    (tmp_path / "a.txt").write_bytes(data)
    [file] = input_files(tmp_path / "a.txt")
    options = ReadOptions(blank_line_documents=True)
    assert list(file.records(options, 70, 140)) == []
    with raises(CorpusError, "corpus-not-utf8", "line 102", "0xff"):
        list(file.records(options, 630, 720))


def test_objects_of_a_store_read_like_files(s3, tmp_path):
    plain = write_jsonl(tmp_path / "a.jsonl", "one", "two").read_bytes()
    for name, data in {
        "text/a.jsonl": plain,
        "text/sub/b.jsonl.gz": gzip.compress(plain),
        "text/c.parquet": write_parquet(tmp_path / "c.parquet", "one", "two").read_bytes(),
        "text/picture.png": b"x",
        "textual/d.txt": b"other",
    }.items():
        s3.put(name, data)
    assert list(iter_documents("s3://bucket/text")) == list(iter_documents("s3://bucket/text/")) == ["one", "two"] * 3
    assert list(iter_documents("s3://bucket/text/a.jsonl")) == ["one", "two"]
    assert list(iter_documents("s3://bucket/text*/*.txt")) == ["other"]
    assert [file.name for file in input_files("s3://bucket/text/")] == ["a.jsonl", "c.parquet", "sub/b.jsonl.gz"]
    [file] = input_files("s3://bucket/text/a.jsonl")
    assert [list(file.records(ReadOptions(), begin, begin + 15)) for begin in (0, 15, 30)] == [
        [(0, "one")], [(25, "two")], []
    ]  # fmt: skip
    with raises(CorpusError, "no-text-objects", "s3://bucket/nothing/"):
        iter_documents("s3://bucket/nothing/")
    with raises(CorpusError, "not-listed", "s3://absent/x", "NoSuchBucket"):
        iter_documents("s3://absent/x")
    s3.put("text/d.parquet", b"")  # an upload that failed
    with raises(CorpusError, "corpus-unreadable", "text/d.parquet"):
        list(iter_documents("s3://bucket/text/"))


def test_files_are_named_by_their_path_below_the_given_name(tmp_path):
    (tmp_path / "web").mkdir()
    for name in ("web/a.txt", "web/b.md"):
        (tmp_path / name).write_text("x")
    for given, names in (
        (tmp_path / "web", ["a.txt", "b.md"]),
        (tmp_path, ["web/a.txt", "web/b.md"]),
        (f"{tmp_path}/web/*.txt", ["a.txt"]),
        (f"{tmp_path}/*/*.md", ["web/b.md"]),
        (tmp_path / "web" / "b.md", ["b.md"]),
    ):
        assert [file.name for file in input_files(given)] == names


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "train", 3])
def test_a_source_is_named_like_a_folder(name):
    with raises(CorpusError, "source-name", repr(name)):
        named_sources({name: KING_JAMES})


BAD_CONTENTS = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', ("corpus-not-json", "line 2:")),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', ("corpus-no-field", "line 2:", "'text'", "['body']")),
    ("a.jsonl", b"[1]\n", ("corpus-no-field", "line 1:", "list")),
    ("a.jsonl", b'{"text": "x", "y": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", ("corpus-not-json", "line 1:")),
    ("a.jsonl", b'{"text": null}\n', ("corpus-field-not-text", "line 1:", "NoneType")),
    ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), ("corpus-not-utf8", "line 1:", "0xff")),
    ("a.jsonl", b'{"text": 7}\n', ("corpus-field-not-text", "line 1:", "int")),
    ("a.jsonl", b'{"text": "\\ud800"}\n', ("corpus-lone-surrogate", "line 1:", "'text'")),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', ("corpus-not-utf8", "line 3:", "0xff")),
    ("a.txt", b"fine\nfine\n\xe9t\xe9", ("corpus-not-utf8", "line 3:", "0xe9")),
    ("a.txt", b" \n", ("corpus-empty",)),
    ("a.jsonl", b"", ("corpus-empty",)),
    ("a.txt.gz", gzip.compress(b"text" * 999)[:-9], ("corpus-unreadable",)),
    ("a.jsonl.gz", b"", ("corpus-unreadable",)),
    ("a.jsonl.zst", b"", ("corpus-unreadable",)),
    ("a.txt.gz", b"no gzip", ("corpus-unreadable",)),
    ("a.txt.zst", b"no zstd", ("corpus-unreadable",)),
    ("a.txt.zst", zstd.compress(b"text" * 99_999)[:-5], ("corpus-unreadable",)),
    ("a.parquet", b"no parquet", ("corpus-unreadable",)),
]


@pytest.mark.parametrize(("name", "data", "expected"), BAD_CONTENTS, ids=[f"{n} {i}" for n, _, (i, *_) in BAD_CONTENTS])
def test_bad_contents_are_refused_with_file_and_line(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    with raises(CorpusError, *expected, name) as caught:
        list(iter_documents(tmp_path / name))
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("nowhere.txt", ("source-missing", "'nowhere.txt'")),
        ("*.none", ("source-missing", "'*.none'")),
        ("gs://bucket/key", ("unknown-storage-scheme", "gs://")),
        ("package:other", ("unknown-packaged-corpus", "'package:other'", "package:king-james")),
        ("The text itself. " * 40, ("source-not-a-path",)),
        ([], ("no-source",)),
    ],
)
def test_a_source_that_does_not_exist_is_refused_at_once(source, expected):
    with raises(CorpusError, *expected) as caught:
        iter_documents(source)
    assert caught.value.remedy


def test_a_parquet_column_that_is_absent_or_not_text_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", "x")
    for field, expected in (
        ("body", ("corpus-no-column", "'body'", "['id', 'text']")),
        ("id", ("corpus-column-not-text", "'id'", "int64")),
    ):
        with raises(CorpusError, *expected):
            list(iter_documents(path, text_field=field))


def test_a_folder_without_text_and_a_file_of_another_format_are_refused(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    with raises(CorpusError, "source-missing", tmp_path):
        iter_documents(tmp_path)
    with raises(CorpusError, "unknown-corpus-format", ".csv"):
        iter_documents(tmp_path / "table.csv")


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
