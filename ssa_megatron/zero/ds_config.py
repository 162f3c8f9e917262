"""Recipe -> DeepSpeed's configuration, the only place it is written.

Megatron's schedule accumulates micro-batches itself, so DeepSpeed always sees one accumulation step and an unmanaged boundary.
The bf16 keys select fp32 gradient accumulation and fp32 reduction; without `communication_data_type` the finished fp32
gradients would be rounded to bf16 on their way through the all-reduce, silently. What may overlap does: see `overlaps`.
"""

from typing import Any

from ssa_megatron.config import Recipe


def overlaps(recipe: Recipe) -> bool:
    """Whether gradients and weights travel on streams of their own while the model computes.

    Not under ZeRO-1: there gradients are finished after the schedule only, and DeepSpeed asserts that nothing is reduced before.
    Not under ZeRO-2: on two GPUs over NCCL, with bf16 weights and several buckets, sums came out wrong or not finite (DeepSpeed
    0.19.8; found by `tests/gpu/training/test_a_gpu_each.py`). Not with offload, whose copies to the host read the buffers that
    are reduced: DeepSpeed orders the two by events that nothing here has run on a GPU.
    """
    return recipe.zero.stage == 3 and not recipe.zero.offload_optimizer


def deepspeed_config(recipe: Recipe) -> dict:
    """The JSON that `ds_config.json` of the run folder shows."""
    bucket = recipe.zero.reduce_bucket_mb * 2**20 // 4
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.train.micro_batch_rows,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": recipe.optimizer.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": recipe.zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": overlaps(recipe),
        },
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
    }
    if recipe.zero.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        config["zero_force_ds_cpu_optimizer"] = (
            False  # torch's fused AdamW runs on the CPU; DeepSpeed's needs a compiler
        )
    if recipe.train.precision == "bf16":
        config |= {
            "bf16": {"enabled": True, "immediate_grad_update": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return config
