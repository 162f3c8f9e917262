"""The model's modules with their pointwise work fused: what `build.py` puts in place of the plain ones.

Parameters, names and initial weights are those of the plain modules, so checkpoints and topologies do not differ.
"""

from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ssa_megatron.model.attention import SSASelfAttention
from ssa_megatron.model.batch import ForwardContext
from ssa_megatron.model.fused.add_norm import add_norm
from ssa_megatron.model.fused.qkv import split_and_rotate
from ssa_megatron.model.fused.swiglu import swiglu
from ssa_megatron.model.norm import RMSNorm


class FusedNorm(RMSNorm):
    """RMSNorm, alone or together with the residual sum before it."""

    def forward(self, x: Tensor, delta: Tensor | None = None, *, both: bool = False):
        """The norm of `x + delta`, `[..., H]`; both: (`x + delta`, its norm), the residual stream and what the next block reads.

        One method for both, because ZeRO-3 gathers the weight when the module is called.
        """
        total, normed = add_norm(x, delta, self.weight, self.eps)
        return (total, normed) if both else normed


class FusedSelfAttention(SSASelfAttention):
    """SSASelfAttention that splits and rotates its projection in one pass."""

    def project(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """As SSASelfAttention's; the three are views of batch-first storage."""
        mixed, sizes = self.get_query_key_value_tensors(hidden_states, split_qkv=False)  # [n, B, groups, (G + 2) * D]
        dim = self.hidden_size_per_attention_head
        return split_and_rotate(mixed.flatten(2), rotary, sizes[0] // dim, dim)


class FusedMLP(MLP):
    """megatron-core's MLP with a fused SwiGLU."""

    def forward(self, hidden_states: Tensor, *_, **__) -> tuple[Tensor, None]:
        """`[n, B, hidden]` -> (`[n, B, hidden]`, no bias)."""
        gate_and_up, _ = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(swiglu(gate_and_up))
        return output, None


class FusedLayer(TransformerLayer):
    """megatron-core's layer with each residual sum and the norm that follows it in one operation."""

    def forward(self, hidden_states: Tensor, *_, packed_seq_params: ForwardContext, **__) -> tuple[Tensor, None]:
        """`[n, B, hidden]` -> (`[n, B, hidden]`, no cross-attention context)."""
        residual, normed = self.input_layernorm(hidden_states, both=True)
        attended, _ = self.self_attention(normed, packed_seq_params=packed_seq_params)
        residual, normed = self.pre_mlp_layernorm(residual, attended, both=True)
        output, _ = self.mlp(normed)
        return residual + output, None
