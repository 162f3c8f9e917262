"""The trunk draw is a pure function: known values, fair shares, and nothing of the process in it."""

import itertools
import random
import subprocess
import sys

import pytest
import torch

from ssa_megatron.model.trunk import draw_trunk
from tests.launch import environment

PINNED = "fsfssssssfffffssssssssfsssssfsssffsffsssfsfffsfsffsffsssffff"


def draws(seed: int, count: int, probability: float = 0.5) -> list[str]:
    return [draw_trunk(seed, step, microbatch, probability) for step in range(count // 10) for microbatch in range(10)]


def test_known_draws_stay_what_they_are():
    """A change here changes every run that is resumed."""
    assert "".join(trunk[0] for trunk in draws(1234, 60)) == PINNED


def test_the_global_random_state_is_neither_read_nor_moved():
    first = draws(7, 100)
    random.seed(99)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert draws(7, 100) == first
    assert torch.equal(torch.get_rng_state(), before)


def test_another_process_of_any_rank_draws_the_same():
    program = (
        "from ssa_megatron.model.trunk import draw_trunk; "
        "print(''.join(draw_trunk(1234, i // 10, i % 10)[0] for i in range(60)))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(RANK="3", WORLD_SIZE="8", LOCAL_RANK="3", PYTHONHASHSEED="5"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout.strip() == PINNED


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_the_share_of_sparse_draws_is_near_its_probability(probability):
    share = draws(3, 10_000, probability).count("sparse") / 10_000
    assert abs(share - probability) < 4 * (probability * (1 - probability) / 10_000) ** 0.5


def test_probabilities_zero_and_one_are_exact():
    assert set(draws(5, 10_000, 0.0)) == {"full"}
    assert set(draws(5, 10_000, 1.0)) == {"sparse"}


def test_seed_step_and_micro_batch_each_change_the_draws():
    def sequence(of):
        return [of(i) for i in range(64)]

    reference = sequence(lambda i: draw_trunk(1, i, 0))
    assert sequence(lambda i: draw_trunk(2, i, 0)) != reference
    assert sequence(lambda i: draw_trunk(1, i, 1)) != reference
    assert sequence(lambda i: draw_trunk(1, 0, i)) != reference


def test_neighbouring_draws_are_independent():
    found = [trunk == "sparse" for trunk in draws(11, 10_000)]
    equal = sum(a == b for a, b in itertools.pairwise(found))
    assert abs(equal / 9_999 - 0.5) < 0.02
