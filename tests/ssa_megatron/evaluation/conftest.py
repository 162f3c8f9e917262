"""The tiny run of tests/ssa_megatron/hf, its export, and a text to evaluate them on."""

import pytest

from ssa_megatron.evaluation.targets import opened
from ssa_megatron.evaluation.text import Text
from tests.ssa_megatron.hf.conftest import corpus, folder, one_thread, own_module_cache, run, tokenizer, weights  # noqa: F401


@pytest.fixture(scope="session")
def body():
    return Text("corpus", corpus().split("\n\n")[:80])


@pytest.fixture
def tiny(folder):  # noqa: F811
    """Opened anew for each test: some change its settings."""
    with opened(folder, "tiny", step=None, device="cpu", dtype=None) as one:
        yield one
