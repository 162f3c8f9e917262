"""Which exit code a launch ends with, and how often it restarts."""

import pytest

from ssa_cluster.exit_codes import RestartBudget, describe, ending


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([75, 75], 75),
        ([75, -15], 75),  # torchrun ends the others as soon as the first has ended
        ([-15, 75, 0], 75),
        ([3, 3], 3),
        ([-9, 3], 3),
        ([6, 1], 6),
        ([1, 0], None),
        ([-9, -15], None),
        ([0, -11], None),
        ([1], None),
        ([70], None),
    ],
)
def test_one_code_for_all_ranks(codes, expected):
    assert ending(codes) == expected


def test_the_codes_are_those_of_the_training_system():
    """cluster/ imports nothing of ours, so that it runs on a login node; hence this comparison."""
    from ssa_cluster.exit_codes import HOPELESS, START_AGAIN
    from ssa_megatron import errors

    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.SSAError)]
    assert {kind.exit_code for kind in kinds} - {1} == set(HOPELESS)
    assert errors.EXIT_REQUEUE == START_AGAIN


def test_a_code_in_words():
    assert describe(-9) == "killed by SIGKILL"
    assert describe(1) == "exit code 1"
    assert describe(-99) == "killed by signal 99"


def test_crashes_are_counted_anew_after_a_committed_checkpoint(tmp_path):
    budget = RestartBudget(tmp_path, 2)
    assert [budget.spend(), budget.spend(), budget.spend()] == [True, True, False]
    budget = RestartBudget(tmp_path, 2)
    assert [budget.spend(), budget.spend()] == [True, True]
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-00000010")
    assert [budget.spend(), budget.spend(), budget.spend()] == [True, True, False]
