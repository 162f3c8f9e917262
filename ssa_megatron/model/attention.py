"""SSA inside a megatron-core transformer layer: projections and gate here, the mathematics in `kernels`.

`SSASelfAttention` adds the column-parallel gate and per-document rotary positions to megatron-core's self-attention;
`SSACoreAttention` fills its `core_attention` slot and dispatches on `attention.kind`. Both are free of communication beyond
the linear layers' own: heads, and with them routing groups, live whole on one tensor-parallel rank.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

import kernels
from ssa_megatron.config.sections import Attention
from ssa_megatron.model.alignment import hang_on
from ssa_megatron.model.batch import SSABatch
from ssa_megatron.model.rope import apply_rotary
from ssa_megatron.model.shapes import GATES


class SSACoreAttention(nn.Module):
    """The `core_attention` slot: rotated q, k, v and gate logits in, gated attention output out."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, *, attention: Attention, **_):
        super().__init__()
        self.attention = attention
        self.spec = kernels.BlockSpec(attention.block_size, attention.block_count, attention.topk)

    def forward(self, q_nbhd: Tensor, k_nbhd: Tensor, v_nbhd: Tensor, gate_nbg: Tensor, batch: SSABatch) -> Tensor:
        """q `[N, B, heads, D]`, k and v `[N, B, kv_heads, D]`, gate logits `[N, B, heads * gates]` -> `[N, B, heads * D]`."""
        q, k, v = (x.transpose(0, 1) for x in (q_nbhd, k_nbhd, v_nbhd))
        gate = torch.sigmoid(gate_nbg.float()).transpose(0, 1)  # [B, N, heads * gates]
        where = {"doc_starts": batch.doc_starts, "backend": self.attention.backend}
        kind = self.attention.kind
        if batch.wants_statistics:
            found = kernels.attention_statistics(q, k, self.spec, doc_starts=batch.doc_starts)
            batch.statistics.append(torch.stack((found.sparsity.mean(), found.entropy.mean())))
        if kind == "ssa":
            output, loss = kernels.ssa_attention(q, k, v, gate, self.spec, trunk=batch.trunk, **where)
            if torch.is_grad_enabled() or not self.training:  # under recomputation the first pass runs without grad
                batch.alignment.append(loss.detach())
            if torch.is_grad_enabled():
                output = hang_on(output, loss, batch.alignment_scale)
        elif kind == "full":
            output = _gated(kernels.full_attention(q, k, v, **where), gate)
        elif kind == "moba":
            output = _gated(kernels.sparse_attention(q, k, v, self.spec, **where), gate)
        else:
            gate = gate.unflatten(-1, (-1, GATES["nsa"]))  # head-major
            output = (
                _gated(kernels.compressed_attention(q, k, v, self.spec, **where), gate[..., 0])
                + _gated(kernels.sparse_attention(q, k, v, self.spec, **where), gate[..., 1])
                + _gated(kernels.window_attention(q, k, v, self.attention.window, **where), gate[..., 2])
            )
        return output.transpose(0, 1).flatten(2)


def _gated(output_bnhd: Tensor, gate_bnh: Tensor) -> Tensor:
    return (output_bnhd * gate_bnh.unsqueeze(-1)).to(output_bnhd.dtype)


class SSASelfAttention(SelfAttention):
    """megatron-core's self-attention with SSA's gate: one (nsa: three) scalar per query head and token (method.md, step 2)."""

    def __init__(self, config, submodules, layer_number, *, attention: Attention, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.linear_gate = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            config.num_attention_heads * GATES[attention.kind],
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def forward(self, hidden_states: Tensor, attention_mask=None, *, packed_seq_params: SSABatch, **_):
        """`[N, B, hidden]` -> (`[N, B, hidden]`, no bias). `packed_seq_params` carries the SSABatch; masks are not used."""
        batch = packed_seq_params
        query, key, value = self.get_query_key_value_tensors(hidden_states)
        gate, _ = self.linear_gate(hidden_states)
        query, key = apply_rotary(query, batch.rotary), apply_rotary(key, batch.rotary)
        if self.checkpoint_core_attention and self.training:

            def core(*tensors):
                return self.core_attention(*tensors, batch)

            output = tensor_parallel.checkpoint(core, False, query, key, value, gate)
        else:
            output = self.core_attention(query, key, value, gate, batch)
        return self.linear_proj(output)
