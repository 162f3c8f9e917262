"""What DeepSpeed is told: fp32 sums and reductions under bf16, one accumulation step, and overlap where it is right."""

import os

import pytest

from ssa_megatron.parallel import state
from ssa_megatron.planning.memory import reduce_buffers
from ssa_megatron.planning.rank_shapes import rank_shapes
from ssa_megatron.zero.ds_config import deepspeed_config
from tests.ssa_megatron.support import tiny

STAGES = [  # overrides, does communication overlap, buffers that gradients are collected in
    ({"zero__stage": 1}, False, None),
    ({"zero__stage": 2}, False, 1),
    ({"zero__stage": 2, "zero__offload_optimizer": True}, False, 1),
    ({"zero__stage": 3}, True, 1),
    ({"zero__stage": 3, "zero__offload_optimizer": True}, False, 1),
]


@pytest.mark.parametrize(("overrides", "overlaps", "buffers"), STAGES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_communication_overlaps_where_deepspeed_does_it_right_and_the_plan_counts_its_buffers(
    overrides, overlaps, buffers, precision
):
    recipe = tiny(train__precision=precision, zero__reduce_bucket_mb=4, **overrides)
    assert deepspeed_config(recipe)["zero_optimization"]["overlap_comm"] == overlaps
    if buffers:
        sizes = {"fp32": 4 * buffers, "bf16": 2 * buffers + 4}  # an fp32 copy of bf16 gradients is what is reduced
        assert reduce_buffers(recipe, rank_shapes(recipe, 2)) == sizes[precision] * 2**20


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_bf16_are_summed_and_reduced_in_fp32_by_megatron_alone(stage):
    config = deepspeed_config(tiny(train__precision="bf16", zero__stage=stage))
    assert config["communication_data_type"] == config["data_types"]["grad_accum_dtype"] == "fp32"
    assert config["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert (config["gradient_accumulation_steps"], config["managed_gradient_accumulation"]) == (1, False)


@pytest.mark.parametrize(("tensor", "given", "found"), [(1, None, None), (2, None, "1"), (2, "8", "8")])
def test_kernels_start_in_order_where_tensor_parallelism_hides_its_communication(tensor, given, found, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    with monkeypatch.context() as patch:
        if given:
            patch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", given)
        state._order_kernels(tiny(parallel__tensor=tensor))
        assert os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None) == found
