"""Two ranks on one GPU, over gloo, against one rank: Triton kernels and bf16 in use, judged as on a CPU.

The cases run side by side, each with its own reference: compiling, as quick for many processes as for one, is most of the time.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.ssa_megatron.test_topologies_equal_one_process import BF16, ZERO_2, ZERO_3, compare, cut, judge, kind

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(400)]

SHAPE = {  # a head the kernels' main tiles take, rows of several blocks
    "model.hidden_size": 128,
    "model.head_dim": 64,
    "model.init_std": 0.05,
    "model.max_sequence_length": 256,
    "train.sequence_length": 256,
    "attention.block_size": 16,
    "attention.block_count": 4,
    "attention.window": 32,
}
CASES = {
    "TP 2, SP, bf16": cut(tensor=2, sequence=True) | BF16,
    "TP 2 on one key/value head, bf16": cut(tensor=2) | BF16 | {"model.num_kv_heads": 1},
    "CP 2, bf16": cut(context=2) | BF16,
    "CP 2, nsa, bf16": cut(context=2) | BF16 | kind("nsa"),
    "DP 2, ZeRO-2, bf16": ZERO_2 | BF16,
    "DP 2, ZeRO-3, bf16": ZERO_3 | BF16,
    "CP 2, selective": cut(context=2, recompute="selective"),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    def one(name: str) -> dict:
        return compare(tmp_path_factory.mktemp("shared"), {2: {name: SHAPE | CASES[name]}})

    with ThreadPoolExecutor(len(CASES)) as pool:
        return {name: result for found in pool.map(one, CASES) for name, result in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_compute_what_one_computes(results, case):
    result = results[f"2: {case}"]
    print(case, result)
    if "bf16" not in case:  # fp32 there is three tf32 products
        result["allowed"] = dict.fromkeys(result["allowed"], 2e-4)
    judge(result)
