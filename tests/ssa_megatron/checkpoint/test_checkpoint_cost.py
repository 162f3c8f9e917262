"""A save and a load hold at most twice the largest tensor in memory, whatever the model's size; no snapshot is made."""

import json

from tests.launch import run


def test_saving_copies_nothing_and_loading_holds_two_tensors_at_most(tmp_path):
    """The embedding is 31 MB, nearly all of the weights; masters and moments are three times that."""
    out = tmp_path / "cost.json"
    sizes = ("64", "1", "120000", "16")
    freed_is_returned = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # else glibc keeps freed tensors, and they count
    run(1, "tests.workers.checkpoint_cost", str(out), *sizes, timeout=150, **freed_is_returned)
    found = json.loads(out.read_text())
    largest = found["largest tensor"]
    assert largest == 4 * 64 * 120_000
    assert found["checkpoint"] > 2.9 * largest
    assert found["files"] > 1
    assert found["peak while saving"] < 0.2 * largest
    assert found["peak while loading"] <= 2 * largest
