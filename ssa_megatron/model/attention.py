"""SSA inside a megatron-core transformer layer: projections and gate here, the mathematics in `kernels`.

`SSASelfAttention` adds the column-parallel gate and per-document rotary positions to megatron-core's self-attention;
`SSACoreAttention` fills its `core_attention` slot and dispatches on `attention.kind`. Routing scores a block by the heads of a
whole group: with more tensor-parallel ranks than key/value heads, each rank routes with all queries of its group, which the
projection has gathered anyway, and attends with its own. Under context parallelism keys and values are gathered here.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

import ssa_kernels
from ssa_megatron.config.sections import Attention
from ssa_megatron.model.auxiliary_loss import attach_auxiliary_loss
from ssa_megatron.model.batch import SSABatch
from ssa_megatron.model.rope import apply_rotary
from ssa_megatron.model.shapes import GATES
from ssa_megatron.parallel.context_parallel import gather_kv


class SSACoreAttention(nn.Module):
    """The `core_attention` slot: rotated q, k, v and gate logits in, gated attention output out."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, *, attention: Attention, pg_collection, **_
    ):
        super().__init__()
        self.attention, self.cp_group = attention, pg_collection.cp
        self.spec = ssa_kernels.BlockSpec(attention.block_size, attention.block_count, attention.topk)

    def forward(
        self,
        q_nbhd: Tensor,
        k_nbhd: Tensor,
        v_nbhd: Tensor,
        gate_nbg: Tensor,
        group_q_nbhd: Tensor | None,
        batch: SSABatch,
    ) -> Tensor:
        """q `[n, B, heads, D]`, k and v `[n, B, kv_heads, D]`, gate logits `[n, B, heads * gates]` -> `[n, B, heads * D]`.

        group_q: the queries of all heads of the group when other ranks hold some of them, else None.
        """
        if batch.query_index is not None:
            k_nbhd, v_nbhd = gather_kv(torch.cat((k_nbhd, v_nbhd), 2), self.cp_group).chunk(2, 2)
        q, k, v = (x.transpose(0, 1) for x in (q_nbhd, k_nbhd, v_nbhd))
        gate = torch.sigmoid(gate_nbg.float()).transpose(0, 1)  # [B, n, heads * gates]
        where = {"doc_starts": batch.doc_starts, "query_index": batch.query_index, "backend": self.attention.backend}
        kind = self.attention.kind
        routing_q = q if group_q_nbhd is None else group_q_nbhd.transpose(0, 1)
        routed = {}
        if group_q_nbhd is not None and kind != "full":
            routed["blocks"] = ssa_kernels.select_blocks(routing_q, k, self.spec, **where)
        if batch.wants_statistics:
            found = ssa_kernels.attention_statistics(routing_q, k, self.spec, **{**where, "backend": "auto"})
            batch.statistics.append(torch.stack((found.sparsity.mean(), found.entropy.mean())))
        if kind == "ssa":
            output, loss = ssa_kernels.ssa_attention(q, k, v, gate, self.spec, trunk=batch.trunk, **routed, **where)
            if torch.is_grad_enabled() or not self.training:  # under recomputation the first pass runs without grad
                batch.alignment.append(loss.detach())
            if torch.is_grad_enabled():
                output = attach_auxiliary_loss(output, loss, batch.alignment_scale)
        elif kind == "full":
            output = _gated(ssa_kernels.full_attention(q, k, v, **where), gate)
        elif kind == "moba":
            output = _gated(ssa_kernels.sparse_attention(q, k, v, self.spec, **routed, **where), gate)
        else:
            gate = gate.unflatten(-1, (-1, GATES["nsa"]))  # head-major
            output = (
                _gated(ssa_kernels.compressed_attention(q, k, v, self.spec, **where), gate[..., 0])
                + _gated(ssa_kernels.sparse_attention(q, k, v, self.spec, **routed, **where), gate[..., 1])
                + _gated(ssa_kernels.window_attention(q, k, v, self.attention.window, **where), gate[..., 2])
            )
        return output.transpose(0, 1).flatten(2)


def _gated(output_bnhd: Tensor, gate_bnh: Tensor) -> Tensor:
    return (output_bnhd * gate_bnh.unsqueeze(-1)).to(output_bnhd.dtype)


class SSASelfAttention(SelfAttention):
    """megatron-core's self-attention with SSA's gate: one (nsa: three) scalar per query head and token (method.md, step 2)."""

    def __init__(self, config, submodules, layer_number, *, attention: Attention, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.ranks_per_group = max(1, self.pg_collection.tp.size() // config.num_query_groups)
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
        query, key, value = self._project(hidden_states)
        gate, _ = self.linear_gate(hidden_states)
        query, key = apply_rotary(query, batch.rotary), apply_rotary(key, batch.rotary)
        group_query = None
        if self.ranks_per_group > 1:  # `query` is the group's: its own part follows, in the order of the gate's heads
            group_query = query.detach()
            query = query.chunk(self.ranks_per_group, dim=2)[self.pg_collection.tp.rank() % self.ranks_per_group]
        if self.checkpoint_core_attention and self.training:

            def core(*tensors):
                return self.core_attention(*tensors, group_query, batch)

            output = tensor_parallel.checkpoint(core, False, query, key, value, gate)
        else:
            output = self.core_attention(query, key, value, gate, group_query, batch)
        return self.linear_proj(output)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[n, B, heads, D]`: this rank's, or those of the whole group it shares with other ranks."""
        if self.ranks_per_group == 1:
            return self.get_query_key_value_tensors(hidden_states)
        mixed, sizes = self.get_query_key_value_tensors(hidden_states, split_qkv=False)  # [n, B, 1, (G + 2) * D]
        return tuple(
            x.unflatten(3, (-1, self.hidden_size_per_attention_head)).squeeze(2) for x in mixed.split(sizes, 3)
        )
