"""Four signals, five recipients, every phase: the ranks end together, with everything committed and exit code 75."""

import pytest

from tests.faults.signals import PAUSES, RECIPIENTS, SIGNALS, deliver
from tests.ssa_megatron.conftest import corpus, dataset, tokenizer  # noqa: F401 (fixtures)
from tests.ssa_megatron.support import recipe_file

TRAINS = ("step", "evaluation", "save", "data")
CASES = [
    pytest.param(phase, SIGNALS[(i + j) % 4], recipient, marks=pytest.mark.slow)
    for i, phase in enumerate(PAUSES)
    for j, recipient in enumerate(RECIPIENTS)
]


def check(folder, dataset, phase, name, recipient, processes=2):  # noqa: F811
    evaluations = {"train__eval_interval": 3, "train__eval_rows": 4}
    recipe = recipe_file(folder, dataset, train__steps=100_000, checkpoint__interval=2, **evaluations)
    found = deliver(phase, name, recipient, folder, ["train", str(recipe)], processes=processes)
    if phase in ("libraries", "meeting"):  # no heartbeat yet, and torchrun lists the first rank that failed, if any
        assert set(found.exits) <= {75, None}, found.output[-4000:]
        assert "nothing to save" in found.output
    else:
        assert found.exits == [75] * processes, found.output[-4000:]
    assert found.step == found.last, found.output[-4000:]
    assert (found.step > 0) == (phase in TRAINS)
    assert found.seconds < 10
    if recipient in ("launcher", "batch shell"):
        assert found.code == 75, found.output[-4000:]
        told_to_end = recipient == "batch shell" and name in ("SIGTERM", "SIGINT")  # scancel
        assert ("asked of SLURM: requeue 7" in found.output) is not told_to_end, found.output[-4000:]
    return found


def test_a_signal_to_one_rank_while_all_wait_for_data_ends_all_of_them_with_the_last_step_committed(tmp_path, dataset):  # noqa: F811
    found = check(tmp_path, dataset, "data", "SIGTERM", "rank 1")
    assert "SIGTERM of rank 1" in found.output
    assert "waiting for data" in found.output


@pytest.mark.parametrize("phase", ["libraries", pytest.param("build", marks=pytest.mark.slow)])
def test_a_signal_before_the_first_step_asks_to_be_started_again(tmp_path, dataset, phase):  # noqa: F811
    found = check(tmp_path, dataset, phase, "SIGUSR1", "rank 0", processes=1)
    assert "nothing to save" in found.output


@pytest.mark.parametrize(("phase", "name", "recipient"), CASES)
def test_a_signal_in_any_phase(tmp_path, dataset, phase, name, recipient):  # noqa: F811
    check(tmp_path, dataset, phase, name, recipient)
