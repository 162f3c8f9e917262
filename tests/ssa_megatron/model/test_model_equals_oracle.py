"""The Megatron model against the independent single-file model with equal weights: loss, alignment, norm, every gradient.

Each launch runs the four kinds of attention, both trunks, tied and untied embeddings, over packed documents of odd lengths.
"""

import json

import pytest

from tests.launch import run

TENSOR = ("parallel.tensor=2",)
SEQUENCE = (*TENSOR, "parallel.sequence=true", "train.sequence_length=78")
LAUNCHES = {
    "one process": (1, ()),
    "one process, whole layers recomputed": (1, ("train.recompute=full",)),
    "two tensor-parallel ranks": (2, TENSOR),
    "two tensor-parallel ranks, sequence-parallel": (2, SEQUENCE),
    "two tensor-parallel ranks, sequence-parallel, whole layers recomputed": (2, (*SEQUENCE, "train.recompute=full")),
    "two pipeline stages": (2, ("parallel.pipeline=2",)),
    "two context-parallel ranks": (2, ("parallel.context=2", "train.sequence_length=76")),
    "two data-parallel ranks": (2, ()),
    "two data-parallel ranks, attention recomputed": (2, ("train.recompute=selective",)),
    "two data-parallel ranks, ZeRO-2": (2, ("zero.stage=2",)),
    "two data-parallel ranks, ZeRO-2, whole layers recomputed": (2, ("zero.stage=2", "train.recompute=full")),
    "two data-parallel ranks, ZeRO-3": (2, ("zero.stage=3",)),
    "two data-parallel ranks, ZeRO-3, attention recomputed": (2, ("zero.stage=3", "train.recompute=selective")),
    "one process, ZeRO-3, whole layers recomputed": (1, ("zero.stage=3", "train.recompute=full")),
    "two tensor- times two data-parallel ranks, sequence-parallel, ZeRO-2": (4, (*SEQUENCE, "zero.stage=2")),
    "two tensor- times two data-parallel ranks, sequence-parallel, ZeRO-3, offloaded, whole layers recomputed": (
        4,
        (*SEQUENCE, "zero.stage=3", "zero.offload_optimizer=true", "train.recompute=full"),
    ),
}
CASES = {
    *(f"ssa {trunk} tied" for trunk in ("full", "sparse", "drawn")),
    *(f"{kind} full tied" for kind in ("full", "moba", "nsa")),
    "ssa drawn untied",
    "nsa full untied",
}


def _launch(name: str):
    return pytest.param(name, marks=pytest.mark.slow if LAUNCHES[name][0] > 2 else ())


@pytest.mark.parametrize("launch", map(_launch, LAUNCHES))
def test_loss_and_every_gradient_are_those_of_the_independent_model(launch, tmp_path):
    processes, overrides = LAUNCHES[launch]
    out = tmp_path / "errors.json"
    run(processes, "tests.workers.oracle_agreement", str(out), *overrides, timeout=240)
    results = {result["case"]: result for result in json.loads(out.read_text())}
    assert results.keys() == CASES
    assert results["ssa full tied"]["trunks"] == ["full", "full"]
    assert results["ssa sparse tied"]["trunks"] == ["sparse", "sparse"]
    assert set(results["ssa drawn tied"]["trunks"]) == {"full", "sparse"}
    for case, result in results.items():
        for figure in ("loss", "alignment", "norm", "gradient"):
            assert result[figure] <= 1e-5, (case, figure, result)
