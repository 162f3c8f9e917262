"""A small corpus, a tokenizer and a dataset of odd sizes, made once; tests that break something break a copy."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssa_pipelines
from tests.pipelines.object_store import ObjectStore, object_store
from tests.pipelines.support import SETTINGS


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """120 chapters, and a few documents that are hard to encode; all different."""
    odd = [
        "x",
        "é",
        "\u2581 a mark \u2581\u2581",
        "tab\tand\r\nnewline\n\n",
        "1234567890" * 9,
        "😀" * 40,
    ]
    chapters = [chapter for number, chapter in enumerate(ssa_pipelines.demo_documents()) if number % 10 == 3]
    return [*chapters[:40], *odd, *chapters[40:]]


@pytest.fixture(scope="session")
def tokenizer(documents, tmp_path_factory) -> ssa_pipelines.Tokenizer:
    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    return ssa_pipelines.train_tokenizer(iter(documents), out, vocab_size=701)


@pytest.fixture(scope="session")
def prepared(documents, tokenizer, tmp_path_factory) -> Path:
    """A dataset of several shards; never written to."""
    out = tmp_path_factory.mktemp("prepared") / "data"
    ssa_pipelines.prepare(iter(documents), tokenizer, out, **SETTINGS)
    return out


@pytest.fixture(scope="session")
def compressed(documents, tokenizer, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compressed") / "data"
    ssa_pipelines.prepare(iter(documents), tokenizer, out, **SETTINGS, compression="zstd:3")
    return out


@pytest.fixture
def dataset(prepared, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@pytest.fixture
def compressed_copy(compressed, tmp_path) -> Path:
    return Path(shutil.copytree(compressed, tmp_path / "compressed-copy"))


@pytest.fixture
def s3() -> Iterator[ObjectStore]:
    """An empty object store, and the environment in which it is used."""
    with object_store() as store:
        yield store
