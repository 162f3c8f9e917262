"""Every legal kind of topology against one process: loss, every gradient, gradient norm, parameters after clipped AdamW steps.

A case is a row of CASES: the number of processes, and what its recipe changes. Cases that compute the same thing share one
reference, made by one process. bf16 is judged by bf16's own error: the distance of one bf16 process from one fp32 process.
"""

import json
from pathlib import Path

import pytest
import torch

from tests.launch import run
from tests.workers.topologies import errors, key

TENSORS = ("gradient", "parameter")
UNTIED = {"model.tied_embeddings": False}
BF16 = {"train.precision": "bf16"}
ZERO_2 = {"zero.stage": 2}
ZERO_3 = {"zero.stage": 3}
OFFLOADED = {"zero.offload_optimizer": True}


def kind(name: str) -> dict:
    return {"attention.kind": name}


def cut(tensor=1, pipeline=1, chunks=1, context=1, sequence=False, recompute="none") -> dict:
    return {
        "parallel.tensor": tensor,
        "parallel.sequence": sequence,
        "parallel.pipeline": pipeline,
        "parallel.virtual_pipeline": chunks,
        "parallel.context": context,
        "train.recompute": recompute,
    }


CASES = {
    2: {
        "DP 2": {},
        "DP 2, bf16": BF16,
        "TP 2": cut(tensor=2),
        "TP 2, SP, full recompute": cut(tensor=2, sequence=True, recompute="full"),
        "TP 2, SP, bf16": cut(tensor=2, sequence=True) | BF16,
        "TP 2 on one key/value head": cut(tensor=2) | {"model.num_kv_heads": 1},
        "TP 2 on one key/value head, SP, selective, nsa": cut(tensor=2, sequence=True, recompute="selective")
        | {"model.num_kv_heads": 1}
        | kind("nsa"),
        "TP 2 on one key/value head, moba, untied": cut(tensor=2) | {"model.num_kv_heads": 1} | kind("moba") | UNTIED,
        "PP 2": cut(pipeline=2),
        "PP 2, untied": cut(pipeline=2) | UNTIED,
        "PP 2, full recompute": cut(pipeline=2, recompute="full"),
        "PP 2, bf16": cut(pipeline=2) | BF16,
        "PP 2 interleaved": cut(pipeline=2, chunks=2),
        "PP 2 interleaved, untied, selective": cut(pipeline=2, chunks=2, recompute="selective") | UNTIED,
        "ZeRO-2": ZERO_2,
        "ZeRO-2, bf16, CP 2": ZERO_2 | cut(context=2) | BF16,
        "ZeRO-3, full recompute": ZERO_3 | cut(recompute="full"),
        "ZeRO-3, CP 2, untied": ZERO_3 | cut(context=2) | UNTIED,
        "CP 2": cut(context=2),
        "CP 2, bf16": cut(context=2) | BF16,
        "CP 2, selective": cut(context=2, recompute="selective"),
        "CP 2, full attention": cut(context=2) | kind("full"),
        "CP 2, moba": cut(context=2) | kind("moba"),
        "CP 2, nsa": cut(context=2) | kind("nsa"),
    },
    4: {
        "TP 2, SP, PP 2": cut(tensor=2, sequence=True, pipeline=2),
        "TP 2, SP, CP 2": cut(tensor=2, sequence=True, context=2),
        "PP 2, CP 2, nsa": cut(pipeline=2, context=2) | kind("nsa"),
        "ZeRO-3, TP 2, CP 2": ZERO_3 | cut(tensor=2, context=2),
    },
}
SLOW_CASES = {
    4: {
        "TP 4 on two key/value heads, SP": cut(tensor=4, sequence=True),
        "TP 2, PP 2 interleaved, full recompute": cut(tensor=2, pipeline=2, chunks=2, recompute="full"),
        "TP 2 on one key/value head, CP 2": cut(tensor=2, context=2) | {"model.num_kv_heads": 1},
        "PP 2, DP 2": cut(pipeline=2),
        "ZeRO-2, TP 2, SP, DP 2": ZERO_2 | cut(tensor=2, sequence=True),
        "ZeRO-3, TP 2 on one key/value head, DP 2": ZERO_3 | cut(tensor=2) | {"model.num_kv_heads": 1},
        "ZeRO-2 offloaded, TP 2, SP, DP 2": ZERO_2 | OFFLOADED | cut(tensor=2, sequence=True),
        "ZeRO-3 offloaded, CP 2, DP 2, bf16": ZERO_3 | OFFLOADED | cut(context=2) | BF16,
        "PP 4": cut(pipeline=4),
        "CP 2, DP 2": cut(context=2),
        "CP 4": cut(context=4),
        "TP 2, DP 2, untied": cut(tensor=2) | UNTIED,
        "DP 4, bf16": BF16,
    },
    8: {
        "TP 2, SP, PP 2, DP 2": cut(tensor=2, sequence=True, pipeline=2),
        "TP 2, SP, PP 2, CP 2": cut(tensor=2, sequence=True, pipeline=2, context=2),
        "TP 2, CP 2, DP 2, bf16": cut(tensor=2, context=2) | BF16,
        "PP 2 interleaved, CP 2, DP 2, full recompute": cut(pipeline=2, chunks=2, context=2, recompute="full"),
        "PP 4, TP 2, SP, untied": cut(pipeline=4, tensor=2, sequence=True) | UNTIED,
        "PP 2 interleaved, TP 2, SP, CP 2, selective": cut(2, 2, 2, 2, sequence=True, recompute="selective"),
        "ZeRO-3, TP 2, SP, CP 2, DP 2": ZERO_3 | cut(tensor=2, sequence=True, context=2),
        "ZeRO-2, CP 4, DP 2, moba": ZERO_2 | cut(context=4) | kind("moba"),
        "TP 8 on two key/value heads, SP": cut(tensor=8, sequence=True),
    },
}


def compare(folder: Path, cases: dict[int, dict[str, dict]]) -> dict[str, dict]:
    """{case: its relative errors}, through one launch of one process and one of each number of processes."""
    tables = {
        world: [{"name": name, "recipe": recipe} for name, recipe in rows.items()] for world, rows in cases.items()
    }
    every = folder / "all.json"
    in_fp32 = [
        {"name": case["name"], "recipe": case["recipe"] | {"train.precision": "fp32"}}
        for table in tables.values()
        for case in table
    ]
    every.write_text(json.dumps([case for table in tables.values() for case in table] + in_fp32))
    run(1, "tests.workers.topologies", str(folder), str(every), timeout=400)
    results = {}
    for world, table in tables.items():
        found = {}
        for first in range(0, len(table), 12):  # gloo's groups and their threads live as long as the processes
            path = folder / f"cases-{world}-{first}.json"
            path.write_text(json.dumps(table[first : first + 12]))
            run(world, "tests.workers.topologies", str(folder), str(path), timeout=300)
            found |= json.loads(Path(f"{path}.out").read_text())
        for case in table:
            result = found[case["name"]]
            result["allowed"] = dict.fromkeys(("loss", "alignment", "norm", "gradient", "parameter"), 1e-5)
            if case["recipe"].get("train.precision") == "bf16":
                wide = {"name": "", "recipe": case["recipe"] | {"train.precision": "fp32"}}
                own = errors(*(torch.load(folder / f"{key(c)}.pt", weights_only=True) for c in (case, wide)))
                numbers = max(
                    own[figure] for figure in ("loss", "alignment", "norm")
                )  # of few bits each: one may be lucky
                # two bf16 computations differ by the noise of both; a single number's noise is a single draw
                result["allowed"] = {f: 2 * own[f] if f in TENSORS else 3 * numbers for f in result["allowed"]}
            results[f"{world}: {case['name']}"] = result
    return results


def case_names(cases: dict[int, dict]) -> list[str]:
    return [f"{world}: {name}" for world, rows in cases.items() for name in rows]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return compare(tmp_path_factory.mktemp("topologies"), CASES)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    return compare(tmp_path_factory.mktemp("topologies"), SLOW_CASES)


def judge(result: dict) -> None:
    for figure, allowed in result["allowed"].items():
        assert result[figure] <= allowed, (figure, result)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", case_names(CASES))
def test_a_topology_computes_what_one_process_computes(small, case):
    judge(small[case])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", case_names(SLOW_CASES))
def test_more_mixes_compute_what_one_process_computes(large, case):
    judge(large[case])
