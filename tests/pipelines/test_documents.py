"""Sources become documents in a fixed order, and anything unreadable is named with its file and line."""

import ast
import gzip
import json

import pyarrow as pa
import pytest
from backports import zstd
from pyarrow import parquet

from ssa_pipelines import KING_JAMES, CorpusError, demo_documents, iter_documents
from ssa_pipelines.corpus.documents import Format, records
from ssa_pipelines.corpus.king_james import king_james_file
from ssa_pipelines.corpus.sources import input_files, named_sources


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


def test_text_behind_links_is_read_and_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("here")
    (tmp_path / "elsewhere" / "b.txt").write_text("there")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "round").symlink_to(tmp_path / "corpus")  # a walk that follows links must still end
    assert list(iter_documents(tmp_path / "corpus")) == ["here", "there"]
    (tmp_path / "elsewhere" / "c.txt").symlink_to(tmp_path / "removed.txt")
    for given in (tmp_path / "corpus", tmp_path / "elsewhere" / "*.txt"):
        with pytest.raises(CorpusError, match=r"c\.txt: a link to .*removed\.txt, which is not there"):
            iter_documents(given)


def test_a_pattern_that_matches_folders_reads_what_is_in_them_once(tmp_path):
    (tmp_path / "corpus" / "sub").mkdir(parents=True)
    (tmp_path / "corpus" / "a.txt").write_text("a")
    (tmp_path / "corpus" / "sub" / "b.txt").write_text("b")
    for pattern in ("corpus/*", "corpus/**", "cor*"):
        assert list(iter_documents(str(tmp_path / pattern))) == ["a", "b"], pattern


@pytest.mark.parametrize("name", ["b.jsonl.bz2", "b.txt.xz", "b.parquet.gz", "b.MD.ZIP"])
def test_text_in_a_compression_that_is_not_read_is_refused_and_not_left_out(tmp_path, name, s3):
    write_jsonl(tmp_path / "a.jsonl", "one")
    (tmp_path / name).write_bytes(b"x")
    s3.put("text/a.jsonl", b'{"text": "one"}')
    s3.put(f"text/{name}", b"x")
    for given in (tmp_path, tmp_path / "*", tmp_path / name, "s3://bucket/text/"):
        with pytest.raises(CorpusError, match=r"b\..*: text in a compression that is not read here"):
            iter_documents(given)


def test_files_of_one_name_in_different_folders_are_told_apart(tmp_path):
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


def test_a_parquet_file_yields_one_document_a_row_and_skips_blank_ones(tmp_path):
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
    [file], form = input_files(path), Format(blank_line_documents=True)
    whole = list(records(file, form))
    assert [place for place, _ in whole] == sorted(place for place, _ in whole)
    end = whole[-1][0] + 1
    assert [r for begin in range(0, end, stride) for r in records(file, form, begin, begin + stride)] == whole


def test_a_range_of_a_file_without_blank_lines_is_not_read_beyond_its_end(tmp_path):
    (tmp_path / "a.txt").write_text("a line\n" * 100 + "\n" + "the rest is read by nobody else: \xff")
    data = (tmp_path / "a.txt").read_bytes().replace("\xff".encode(), b"\xff")  # whoever reads that far fails
    (tmp_path / "a.txt").write_bytes(data)
    [file] = input_files(tmp_path / "a.txt")
    form = Format(blank_line_documents=True)
    assert list(records(file, form, 70, 140)) == []
    with pytest.raises(CorpusError, match="line 102: byte 0xff"):
        list(records(file, form, 630, 720))


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
    assert [list(records(file, Format(), begin, begin + 15)) for begin in (0, 15, 30)] == [
        [(0, "one")], [(25, "two")], []
    ]  # fmt: skip
    with pytest.raises(CorpusError, match="no object of text is there"):
        iter_documents("s3://bucket/nothing/")
    with pytest.raises(CorpusError, match=r"s3://absent/x: cannot be listed .*NoSuchBucket"):
        iter_documents("s3://absent/x")
    s3.put("text/d.parquet", b"")  # an upload that failed
    with pytest.raises(CorpusError, match=r"text/d\.parquet: cannot be read"):
        list(iter_documents("s3://bucket/text/"))


def test_files_are_called_by_their_path_below_the_name_they_were_given_by(tmp_path):
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
    with pytest.raises(CorpusError, match="not usable as a folder name"):
        named_sources({name: KING_JAMES})


BAD_CONTENTS = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl, line 2: not valid JSON"),
    ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "a.jsonl, line 2: no field 'text' (fields ['body'])"),
    ("a.jsonl", b"[1]\n", "a.jsonl, line 1: no field 'text' (list)"),
    ("a.jsonl", b'{"text": "x", "y": ' + b"[" * 99_999 + b"]" * 99_999 + b"}", "a.jsonl, line 1: not valid JSON"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl, line 1: field 'text' is NoneType"),
    ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), "a.jsonl, line 1: byte 0xff is not valid UTF-8"),
    ("a.jsonl", b'{"text": 7}\n', "a.jsonl, line 1: field 'text' is int"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl, line 1: field 'text' holds half of a surrogate pair"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', "a.jsonl, line 3: byte 0xff is not valid UTF-8"),
    ("a.txt", b"fine\nfine\n\xe9t\xe9", "a.txt, line 3: byte 0xe9 is not valid UTF-8"),
    ("a.txt", b" \n", "not one document with text in it"),
    ("a.jsonl", b"", "not one document with text in it"),
    ("a.txt.gz", gzip.compress(b"text" * 999)[:-9], "a.txt.gz: cannot be read"),
    ("a.jsonl.gz", b"", "a.jsonl.gz: cannot be read (it is empty"),
    ("a.jsonl.zst", b"", "a.jsonl.zst: cannot be read"),
    ("a.txt.gz", b"no gzip", "a.txt.gz: cannot be read"),
    ("a.txt.zst", b"no zstd", "a.txt.zst: cannot be read"),
    ("a.txt.zst", zstd.compress(b"text" * 99_999)[:-5], "a.txt.zst: cannot be read"),
    ("a.parquet", b"no parquet", "a.parquet: cannot be read"),
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
        ("gs://bucket/key", "gs:// cannot be listed"),
        ("package:other", "'package:other': no such packaged corpus"),
        ("The text itself. " * 40, "not a path"),
        ([], "no source of text was given"),
    ],
)
def test_a_source_that_is_none_is_refused_at_once(source, message):
    with pytest.raises(CorpusError) as caught:
        iter_documents(source)
    assert message in caught.value.problem
    assert caught.value.remedy


def test_a_parquet_column_that_is_absent_or_no_text_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", "x")
    for field, message in (
        ("body", r"no column 'body' \(\['id', 'text'\]\)"),
        ("id", "column 'id' is int64, not text"),
    ):
        with pytest.raises(CorpusError, match=message):
            list(iter_documents(path, text_field=field))


def test_a_folder_without_text_and_a_file_of_another_kind_are_refused(tmp_path):
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(CorpusError, match="a folder without text files"):
        iter_documents(tmp_path)
    with pytest.raises(CorpusError, match=r"unknown kind of file '\.csv'"):
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
