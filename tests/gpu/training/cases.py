"""Topologies of two ranks on GPUs, each against one rank: Triton kernels and bf16 in use, judged as on a CPU.

The cases run side by side, each with its own reference: compiling, as quick for many processes as for one, is most of the time.
"""

from concurrent.futures import Future, ThreadPoolExecutor

from tests.ssa_megatron.parallel.test_topologies_equal_one_process import (
    BF16,
    ZERO_2,
    ZERO_3,
    compare,
    cut,
    judge,
    kind,
)

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
WITHOUT_PIPELINE = {
    "TP 2, SP, bf16": cut(tensor=2, sequence=True) | BF16,
    "TP 2 on one key/value head, bf16": cut(tensor=2) | BF16 | {"model.num_kv_heads": 1},
    "CP 2, bf16": cut(context=2) | BF16,
    "CP 2, nsa, bf16": cut(context=2) | BF16 | kind("nsa"),
    "DP 2, ZeRO-2, bf16": ZERO_2 | BF16,
    "DP 2, ZeRO-3, bf16": ZERO_3 | BF16,
    "CP 2, selective": cut(context=2, recompute="selective"),
}
PIPELINES = {
    "PP 2, bf16": cut(pipeline=2) | BF16,
    "PP 2 interleaved, full recompute, bf16": cut(pipeline=2, chunks=2, recompute="full") | BF16,
    "DP 2, bf16": BF16,
}


def compare_all(folder_of, cases: dict[str, dict]) -> dict[str, Future]:
    """{case: what `judge` needs, or the failure of its launch}; `folder_of` gives each case a folder."""
    with ThreadPoolExecutor(len(cases)) as pool:
        return {
            name: pool.submit(compare, folder_of("case"), {2: {name: SHAPE | changes}})
            for name, changes in cases.items()
        }


def judge_case(results: dict[str, Future], case: str) -> None:
    result = results[case].result()[f"2: {case}"]
    print(case, result)
    if "bf16" not in case:  # fp32 there is three tf32 products
        result["allowed"] = dict.fromkeys(result["allowed"], 2e-4)
    judge(result)
