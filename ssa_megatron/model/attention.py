"""SSA inside a megatron-core transformer layer: projections and gate here, streams in `kinds`, mathematics in `ssa_kernels`.

`SSASelfAttention` adds the column-parallel gate and per-document rotary positions to megatron-core's self-attention.
`SSACoreAttention` fills its `core_attention` slot and calls the layer's attention kind. Routing scores a block by the heads of a
whole query group. With more tensor-parallel ranks than key/value heads, each rank therefore routes with all queries of its group,
which the projection has gathered anyway, and attends with its own. Under context parallelism keys and values are gathered here.
"""

from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

import ssa_kernels
from ssa_megatron.config.sections import Attention
from ssa_megatron.config.variants import KINDS
from ssa_megatron.model.auxiliary_loss import attach_auxiliary_loss
from ssa_megatron.model.batch import ForwardContext
from ssa_megatron.model.kinds.streams import AttentionInputs
from ssa_megatron.model.rope import apply_rotary
from ssa_megatron.parallel.context_parallel import gather_kv


class SSACoreAttention(nn.Module):
    """The `core_attention` slot: rotated q, k, v and gate logits in, gated attention output out."""

    def __init__(
        self, config, layer_number, attn_mask_type, attention_type, *, attention: Attention, pg_collection, **_
    ):
        super().__init__()
        self.kind, self.cp_group = KINDS[attention.kind](attention), pg_collection.cp
        self.backend = attention.backend
        self.spec = ssa_kernels.BlockSpec(attention.block_size, attention.block_count, attention.topk)

    def forward(
        self,
        q_nbhd: Tensor,
        k_nbhd: Tensor,
        v_nbhd: Tensor,
        gate_nbg: Tensor,
        group_q_nbhd: Tensor | None,
        context: ForwardContext,
    ) -> Tensor:
        """q `[n, B, heads, D]`, k and v `[n, B, kv_heads, D]`, gate logits `[n, B, heads * gates]` -> `[n, B, heads * D]`.

        group_q: the queries of all heads of the query group when other ranks hold some of them, else None.
        """
        batch, collector = context.batch, context.collector
        if batch.query_index is not None:
            k_nbhd, v_nbhd = gather_kv(torch.cat((k_nbhd, v_nbhd), 2), self.cp_group).chunk(2, 2)
        q, k, v = (x.transpose(0, 1) for x in (q_nbhd, k_nbhd, v_nbhd))
        gate = torch.sigmoid(gate_nbg.float()).transpose(0, 1)  # [B, n, heads * gates]
        where: dict[str, Any] = {
            "doc_starts": batch.doc_starts,
            "query_index": batch.query_index,
            "backend": self.backend,
        }
        routing_q = q if group_q_nbhd is None else group_q_nbhd.transpose(0, 1)
        blocks: dict[str, Any] = {}
        if group_q_nbhd is not None and self.kind.routed:
            blocks["blocks"] = ssa_kernels.select_blocks(routing_q, k, self.spec, **where)
        if collector.wants_statistics:
            found = ssa_kernels.attention_statistics(routing_q, k, self.spec, **{**where, "backend": "auto"})
            collector.statistics.append(torch.stack((found.sparsity.mean(), found.entropy.mean())))
        inputs = AttentionInputs(q, k, v, gate, self.spec, where, blocks)
        output, loss = self.kind.forward(inputs, batch.trunk)
        if loss is not None:
            if torch.is_grad_enabled() or not self.training:  # under recomputation the first pass runs without grad
                collector.alignment.append(loss.detach())
            if torch.is_grad_enabled():
                output = attach_auxiliary_loss(output, loss, context.alignment_scale)
        return output.transpose(0, 1).flatten(2)


class SSASelfAttention(SelfAttention):
    """megatron-core's self-attention with SSA's gate, one scalar per query head, token and gate (docs/method.md, step 2)."""

    def __init__(self, config, submodules, layer_number, *, attention: Attention, **kwargs):
        super().__init__(config, submodules, layer_number, **kwargs)
        self.ranks_per_group = max(1, self.pg_collection.tp.size() // config.num_query_groups)
        self.linear_gate = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            config.num_attention_heads * KINDS[attention.kind].gates,
            config=config,
            init_method=config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.pg_collection.tp,
        )

    def forward(self, hidden_states: Tensor, attention_mask=None, *, packed_seq_params: ForwardContext, **_):
        """`[N, B, hidden]` -> (`[N, B, hidden]`, no bias). `packed_seq_params` carries the ForwardContext; masks are not used."""
        context = packed_seq_params
        query, key, value = self.project(hidden_states, context.rotary)
        gate, _ = self.linear_gate(hidden_states)
        group_query = None
        if self.ranks_per_group > 1:  # `query` is the group's: its own part follows, in the order of the gate's heads
            group_query = query.detach()
            query = query.chunk(self.ranks_per_group, dim=2)[self.pg_collection.tp.rank() % self.ranks_per_group]
        if self.checkpoint_core_attention and self.training:

            def core(*tensors):
                return self.core_attention(*tensors, group_query, context)

            output = tensor_parallel.checkpoint(core, False, query, key, value, gate)
        else:
            output = self.core_attention(query, key, value, gate, group_query, context)
        return self.linear_proj(output)

    def project(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[n, B, heads, D]`, q and k rotated: this rank's, or those of the whole group it shares with other ranks."""
        if self.ranks_per_group == 1:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
        else:
            mixed, sizes = self.get_query_key_value_tensors(hidden_states, split_qkv=False)  # [n, B, 1, (G + 2) * D]
            dim = self.hidden_size_per_attention_head
            query, key, value = (x.unflatten(3, (-1, dim)).squeeze(2) for x in mixed.split(sizes, 3))
        return apply_rotary(query, rotary), apply_rotary(key, rotary), value
