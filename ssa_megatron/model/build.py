"""Recipe -> megatron-core GPTModel chunks with SSA layers, on this rank, with their initial weights.

Every weight starts from a generator seeded by (seed, global name), so the initial model is the same for every topology.
Fusions that need Apex or TransformerEngine are off; nothing here depends on the device.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, vocab_parallel_cross_entropy
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from ssa_megatron.config import Recipe
from ssa_megatron.model import fused
from ssa_megatron.model.attention import SSACoreAttention, SSASelfAttention
from ssa_megatron.model.names import named_parameters
from ssa_megatron.model.norm import RMSNorm
from ssa_megatron.model.shapes import padded_vocab_size
from ssa_megatron.parallel.state import ParallelState


class Parts(NamedTuple):
    """The modules of a layer that exist in a plain and in a fused form."""

    layer: type
    attention: type
    mlp: type
    norm: type


def parts_of(recipe: Recipe) -> Parts:
    """The modules that `train.pointwise` asks for."""
    if not fused.wanted(recipe):
        return Parts(TransformerLayer, SSASelfAttention, MLP, RMSNorm)
    from ssa_megatron.model.fused import modules  # imports triton

    return Parts(modules.FusedLayer, modules.FusedSelfAttention, modules.FusedMLP, modules.FusedNorm)


class SSAChunk(GPTModel):
    """Consecutive layers of the model: a GPTModel whose loss never sees the vocabulary's padding."""

    def __init__(self, *args, real_vocab_size: int, tp_rank: int, fused: bool, **kwargs):
        super().__init__(*args, **kwargs)
        self.real_vocab_size, self.tp_rank, self.fused = real_vocab_size, tp_rank, fused

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels int64 [B, N], this rank's logits [N, B, vocab / tensor] -> fp32 loss per token [B, N], nats."""
        width = logits.shape[-1]
        real = min(width, max(0, self.real_vocab_size - self.tp_rank * width))
        if self.fused:
            from ssa_megatron.model.fused.cross_entropy import cross_entropy  # imports triton

            return cross_entropy(logits, labels.t(), real, self.pg_collection.tp).t().contiguous()
        if real < width:
            logits = torch.nn.functional.pad(logits[..., :real], (0, width - real), value=-1e9)
        loss = vocab_parallel_cross_entropy(logits, labels.t().contiguous())
        return loss.t().contiguous()


class SSAModel(torch.nn.Module):
    """This rank's part of the model: one chunk of layers, or, under an interleaved schedule, several that are not neighbours."""

    def __init__(self, chunks: list[SSAChunk]):
        super().__init__()
        self.chunks = cast("Sequence[SSAChunk]", torch.nn.ModuleList(chunks))

    def forward(self, *args, **kwargs) -> Tensor:
        """The whole model's forward, where one chunk is the whole model."""
        [model] = self.chunks
        return model(*args, **kwargs)


def build_model(recipe: Recipe, parallel: ParallelState) -> SSAModel:
    """This rank's part of the model, on its device, in the recipe's precision, with initial weights."""
    model = build_chunks(recipe, parallel)
    model.to(device=parallel.device)
    initialize_weights(model, recipe, parallel)
    return model


def build_chunks(recipe: Recipe, parallel: ParallelState) -> SSAModel:
    """This rank's part of the model with weights that are not set (under `torch.device("meta")` they take no memory)."""
    config, layers = (
        transformer_config(recipe),
        recipe.model.num_layers // (parallel.pp_size * parallel.vpp_size),
    )
    chunks = []
    for number in range(parallel.vpp_size):
        chunks.append(
            SSAChunk(
                config=config,
                transformer_layer_spec=layer_spec(recipe, layers),
                vocab_size=padded_vocab_size(recipe),
                max_sequence_length=recipe.train.sequence_length,
                pre_process=parallel.is_first_stage and number == 0,
                post_process=parallel.is_last_stage and number == parallel.vpp_size - 1,
                share_embeddings_and_output_weights=recipe.model.tied_embeddings,
                position_embedding_type="none",  # rotation happens in SSASelfAttention, with each document's own positions
                real_vocab_size=recipe.model.vocab_size,
                tp_rank=parallel.tp_rank,
                fused=fused.wanted(recipe),
                vp_stage=number if parallel.vpp_size > 1 else None,
            )
        )
    return SSAModel(chunks)


def transformer_config(recipe: Recipe) -> TransformerConfig:
    m, p = recipe.model, recipe.parallel
    dtype = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    modes: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        num_attention_heads=m.num_heads,
        num_query_groups=m.num_kv_heads,
        kv_channels=m.head_dim,
        ffn_hidden_size=m.ffn_size,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=m.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=True,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline if p.virtual_pipeline > 1 else None,
        context_parallel_size=p.context,
        sequence_parallel=p.sequence,
        deterministic_mode=recipe.train.deterministic,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=False,  # True is silently wrong with interleaved pipelines
        overlap_p2p_comm=p.virtual_pipeline > 1,  # chunks send and receive while others compute
        **modes[recipe.train.recompute],
    )


def layer_spec(recipe: Recipe, layers: int) -> TransformerBlockSubmodules:
    """megatron-core's own layer and linear modules around SSASelfAttention, `layers` times."""
    attention = {"attention": recipe.attention}
    parts = parts_of(recipe)
    layer = ModuleSpec(
        module=parts.layer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(
                module=parts.attention,
                params={"attn_mask_type": AttnMaskType.causal, **attention},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=lambda **kwargs: SSACoreAttention(**kwargs, **attention),
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.norm,
            mlp=ModuleSpec(
                module=parts.mlp,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=parts.norm)


@torch.no_grad()
def initialize_weights(model: SSAModel, recipe: Recipe, parallel: ParallelState) -> None:
    """Norms at 1, matrices N(0, init_std), padding rows at 0; the same numbers for every topology."""
    for named in named_parameters(model, recipe, parallel):
        parameter: Any = named.parameter
        # megatron-core sets this only where it initializes; without it the gradient norm counts one rank's share of a matrix
        parameter.tensor_model_parallel = not named.replicated
        parameter.ds_pipe_replicated = named.tied_copy  # without this it counts a tied embedding twice
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        flat = parameter.zero_().view(-1)
        drawn: dict[str, Tensor] = {}  # a fused parameter has several slabs of one tensor
        for slab in named.slabs:
            if slab.name not in drawn:
                drawn[slab.name] = _draw(slab.name, slab.global_shape, recipe.train.seed, recipe.model.init_std)
            index = tuple(slice(o, o + n) for o, n in zip(slab.offset, slab.shape, strict=True))
            flat[slab.start : slab.start + slab.numel].copy_(drawn[slab.name][index].flatten())


def _draw(name: str, shape: tuple[int, ...], seed: int, std: float) -> Tensor:
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "little"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
