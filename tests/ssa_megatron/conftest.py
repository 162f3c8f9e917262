"""A world of one process for the tests that need the real model, and a small corpus prepared once."""

import os
from pathlib import Path

import pytest

from tests.ssa_megatron.support import tiny


@pytest.fixture(scope="module")
def alone():
    """ParallelState of one process; the launcher's variables it sets are taken back."""
    from ssa_megatron.parallel import state as parallel

    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    yield parallel.initialize(tiny())
    parallel.finalize()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    import ssa_pipelines

    return [chapter for number, chapter in enumerate(ssa_pipelines.demo_documents()) if number % 60 == 3]


@pytest.fixture(scope="session")
def tokenizer(corpus, tmp_path_factory):
    import ssa_pipelines

    return ssa_pipelines.train_tokenizer(
        iter(corpus), tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=400
    )


@pytest.fixture(scope="session")
def dataset(corpus, tokenizer, tmp_path_factory) -> Path:
    """Rows of 33 tokens of a 400-piece vocabulary; never written to."""
    import ssa_pipelines

    out = tmp_path_factory.mktemp("dataset") / "data"
    ssa_pipelines.prepare(iter(corpus), tokenizer, out, row_length=33, validation_fraction=0.1)
    return out
