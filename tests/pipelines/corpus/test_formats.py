"""A corpus format is added by one class: these tests add one from outside of the package and prepare a dataset with it."""

import pytest

import ssa_pipelines
from ssa_pipelines.corpus.formats import FORMATS
from ssa_pipelines.corpus.formats.base import LineFormat, decode
from ssa_pipelines.corpus.sources import input_files
from tests.errors import raises
from tests.pipelines.support import SETTINGS, contents


class PairsOfLines(LineFormat):
    """`.lines2`: two lines, of which only the second one is text, are one document."""

    @classmethod
    def parse(cls, stream, options, end):
        lines = stream.lines()
        for (position, _), (at, text) in zip(lines, lines, strict=True):
            yield position, decode(text, at).rstrip("\n")


@pytest.fixture
def lines2():
    FORMATS.register(".lines2")(PairsOfLines)
    yield
    FORMATS.unregister(".lines2")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.launch)])
def test_a_format_registered_from_outside_prepares_the_same_rows(lines2, tmp_path, documents, tokenizer, workers):
    texts = [text for text in documents if "\n" not in text and "\r" not in text] + [
        t.replace("\n", " ") for t in documents[:9]
    ]
    (tmp_path / "corpus.lines2").write_text("".join(f"title {n}\n{text}\n" for n, text in enumerate(texts)))
    settings = {**SETTINGS, "validation_fraction": 0.0, "workers": workers}
    ssa_pipelines.prepare(tmp_path / "corpus.lines2", tokenizer, tmp_path / "data", **settings)
    ssa_pipelines.prepare(iter(texts), tokenizer, tmp_path / "same", **settings)
    shards = [
        {name: data for name, data in contents(tmp_path / out).items() if name.endswith(".mds")}
        for out in ("data", "same")
    ]
    assert shards[0] == shards[1]
    assert shards[0]


def test_a_format_registered_from_outside_is_read_compressed_and_names_bad_lines(lines2, tmp_path):
    import gzip

    (tmp_path / "a.lines2.gz").write_bytes(gzip.compress(b"x\none\ny\nt\xff\n"))
    documents = ssa_pipelines.iter_documents(tmp_path)
    assert next(documents) == "one"
    with raises(ssa_pipelines.CorpusError, "corpus-not-utf8", tmp_path / "a.lines2.gz", "line 4:"):
        next(documents)


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "a.lines2").write_text("x\none\n")
    with raises(ssa_pipelines.CorpusError, "unknown-corpus-format", "a.lines2", ".jsonl"):
        input_files(tmp_path / "a.lines2")


def test_two_formats_cannot_have_one_suffix():
    with pytest.raises(ValueError, match=r"\.jsonl"):
        FORMATS.register(".jsonl")(PairsOfLines)
