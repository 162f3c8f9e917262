"""SSA language model for transformers: a Llama block with a gate per query head, run in full or sparse attention.

A cached step gives what the whole sequence at once gives, and a left-padded row what it gives alone, because blocks and
positions are counted from the row's first real token. It refuses attention masks with holes, caches other than transformers'
DynamicCache and unknown modes. This file is copied into exported folders, with those it imports: torch and transformers only.

Shapes: B rows, T new tokens, N tokens seen so far (cache included), H query heads, K key/value heads, G = H / K, D head
dim, M blocks, S blocks selected. `start_b` is the index of each row's first real token, or None when no row is padded.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_ssa import compressed_stream, full_stream, sparse_stream, window_stream
from .cache_ssa import CACHE, adopt_cache, one_cache, pool_blocks
from .configuration_ssa import MODES, SSAConfig, check_choice
from .positions_ssa import check_one_sequence, rotary_table, rotate, row_starts, wide


class SSARMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        normed = wide(x) * torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + self.eps)
        return (normed * wide(self.weight)).to(x.dtype)


def asked(given, config, name):
    """A forward's own argument, or what `from_pretrained(folder, name=...)` left in the config."""
    return getattr(config, name) if given is None else given


@lru_cache
def bundled_kernels():
    """What triton_ssa.py beside this file holds, or None where triton is not installed; imported when it is needed first."""
    try:
        from .triton_ssa import attend, group_scores, serves
    except ImportError:
        return None
    return serves, group_scores, attend


def kernels_for(config, *tensors):
    """(group_scores, attend) of the bundled Triton kernels; None for PyTorch's: gradients, other devices, sparse_backend."""
    if config.sparse_backend == "torch" or not tensors[0].is_cuda:
        return None
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    found = bundled_kernels()
    return found[1:] if found and found[0](*tensors) else None


class SSAAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        hidden, heads, kv_heads, dim = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(hidden, heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, kv_heads * dim, bias=False)
        self.g_proj = nn.Linear(hidden, heads * config.gates, bias=False)
        self.o_proj = nn.Linear(heads * dim, hidden, bias=False)

    def forward(self, x, position_bt, table, start_b, cache, mode, block_count, align, outside=None):
        """x [B, T, hidden] -> ([B, T, hidden], [B, T] alignment loss a token, or None unless `align`).

        outside: an attention function of transformers' interface that runs in place of the full stream.
        """
        config = self.config
        batch, tokens, _ = x.shape
        q, k, v = (f(x).view(batch, tokens, -1, config.head_dim).transpose(1, 2) for f in self._projections())
        gate = torch.sigmoid(wide(self.g_proj(x))).view(batch, tokens, -1, config.gates).transpose(1, 2)
        q, k = rotate(q, table), rotate(k, table)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        names = config.computed_streams(mode)
        pooled_k = pooled_v = None
        if align or "sparse" in names or "compressed" in names:
            values = "compressed" in names
            if cache is not None:
                pooled_k, pooled_v = cache.layers[self.layer_idx].pool(config.block_size, start_b, values)
            else:
                count = k.shape[2] // config.block_size
                pooled_k = pool_blocks(k, 0, count, config.block_size, start_b)
                pooled_v = pool_blocks(v, 0, count, config.block_size, start_b) if values else None

        def sparse():
            kernels = kernels_for(config, q, k, v)
            return sparse_stream(q, k, v, pooled_k, position_bt, start_b, config, block_count, kernels)

        def replaced():
            found, _ = outside(self, q, k, v, None, scaling=config.head_dim**-0.5)
            return found.reshape(batch, tokens, -1, config.head_dim).transpose(1, 2)

        streams = {
            "full": partial(full_stream, q, k, v, position_bt, start_b) if outside is None else replaced,
            "sparse": sparse,
            "compressed": partial(compressed_stream, q, pooled_k, pooled_v, position_bt, config),
            "window": partial(window_stream, q, k, v, position_bt, start_b, config.window),
        }
        loss = None
        if align:
            gated = {name: gate * streams[name]() for name in MODES}
            full, sparse = gated["full"], gated["sparse"]
            loss = F.smooth_l1_loss(full, sparse.detach(), reduction="none")
            loss = (loss + F.smooth_l1_loss(full.detach(), sparse, reduction="none")).mean((1, 3))
            output = gated[mode]
        else:
            output = gate[..., :1] * streams[names[0]]()
            for i, name in enumerate(names[1:], 1):
                output = output + gate[..., i : i + 1] * streams[name]()
        return self.o_proj(output.to(x.dtype).transpose(1, 2).flatten(2)), loss

    def _projections(self):
        return self.q_proj, self.k_proj, self.v_proj


class SSAMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SSADecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = SSAAttention(config, layer_idx)
        self.mlp = SSAMLP(config)
        self.input_layernorm = SSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = SSARMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, *attention_arguments):
        attended, loss = self.self_attn(self.input_layernorm(x), *attention_arguments)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), loss


class SSAPreTrainedModel(PreTrainedModel):
    config_class = SSAConfig
    base_model_prefix = "model"
    _no_split_modules = ["SSADecoderLayer"]  # noqa: RUF012 - transformers' form
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012 - one thing, by the name before 5.24 and after
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, SSARMSNorm):
            nn.init.ones_(module.weight)

    def set_attention(self, *, inference_mode=None, block_count=None):
        """Change what a forward runs when its own arguments do not say; kept by save_pretrained. Returns the model."""
        if inference_mode is not None:
            self.config.inference_mode = check_choice("inference_mode", inference_mode, MODES)
        if block_count is not None:
            if block_count < 1:
                raise ValueError(f"block_count={block_count} must be at least 1: the own block is always selected")
            self.config.block_count = block_count
        return self


@dataclass
class SSAModelOutput(BaseModelOutputWithPast):
    alignment_loss: torch.FloatTensor | None = None


@dataclass
class SSACausalLMOutput(CausalLMOutputWithPast):
    """`alignment_loss`: mean over layers, tokens, heads and channels, before its weight; None unless ssa trains."""

    alignment_loss: torch.FloatTensor | None = None


class SSAModel(SSAPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        config.check_attention()  # `from_pretrained(folder, block_count=...)` sets what the config's own checks never saw
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SSADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = SSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        inference_mode=None,
        block_count=None,
        with_alignment=False,
        cache=None,
        **kwargs,
    ):
        """`attention_mask` [B, past + T]; `past_key_values` may also be given as `cache`.

        `inference_mode` and `block_count` overrule the config for this call. Other arguments are handed to the attention
        function of `config._attn_implementation` where it is not SDPA.
        """
        mode = check_choice("inference_mode", inference_mode or self.config.inference_mode, MODES)
        block_count = self.config.block_count if block_count is None else block_count
        if block_count < 1:
            raise ValueError(f"block_count={block_count} must be at least 1: the own block is always selected")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = one_cache(past_key_values, cache)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not torch.is_grad_enabled():
            past_key_values = DynamicCache()
        if self.training and self.layers[0].gradient_checkpointing:
            use_cache = False  # a layer computed again in backward would append its tokens again
        cache = adopt_cache(past_key_values, len(self.layers)) if use_cache and past_key_values is not None else None
        past = 0 if cache is None else cache.get_seq_length()
        start_b = self._starts(attention_mask, cache, past + x.shape[1], past)
        position = torch.arange(past, past + x.shape[1], device=x.device)[None]
        if start_b is not None:
            position = (position - start_b.to(x.device)[:, None]).clamp(min=0)  # padding itself counts as position 0
        outside = self._outside(mode, cache is not None or start_b is not None or with_alignment, kwargs)
        if position_ids is not None and outside is None:  # an engine from the outside keeps sequences apart itself
            check_one_sequence(position_ids, attention_mask)
        table = rotary_table(position if position_ids is None else position_ids, self.config, wide(x).dtype)
        output_hidden_states = asked(output_hidden_states, self.config, "output_hidden_states")
        hidden, losses = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden.append(x)
            # under device_map the layers' hooks bring these along; all but the cache, which lives where its layer does
            x, loss = layer(x, position, table, start_b, cache, mode, block_count, with_alignment, outside)
            losses.append(loss)
        x = self.norm(x)
        alignment = None
        if with_alignment:
            per_token = torch.stack([loss.to(x.device) for loss in losses]).mean(0)
            real = torch.ones_like(per_token) if attention_mask is None else attention_mask.to(per_token)
            alignment = (per_token * real).sum() / real.sum().clamp(min=1)
        output = SSAModelOutput(
            last_hidden_state=x,
            hidden_states=(*hidden, x) if output_hidden_states else None,
            alignment_loss=alignment,
            **{CACHE: cache},
        )
        return output if asked(return_dict, self.config, "return_dict") else output.to_tuple()

    def _outside(self, mode, more, kwargs):
        """The registered attention function, or None for this file's own streams.

        One call of it is the full stream of rows that it separates itself (vLLM), and can be nothing else here.
        """
        name = self.config._attn_implementation
        if name in (None, "sdpa", "eager"):
            return None
        if self.config.computed_streams(mode) != ["full"] or more:
            raise ValueError(
                f"attn_implementation={name!r} runs full mode only, of kinds with one stream, "
                "without padding, cache and alignment loss"
            )
        return partial(ALL_ATTENTION_FUNCTIONS[name], **kwargs)

    def _starts(self, attention_mask, cache, total, past):
        """[B] first real tokens or None; without a mask a continued cache keeps the padding it was filled with."""
        if attention_mask is None:
            return cache.layers[0].start_b if past else None
        if attention_mask.dim() == 2 and attention_mask.shape[1] != total:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens; cache and input hold {total}")
        start_b = row_starts(attention_mask)
        if cache is not None:
            cache.layers[0].start_b = start_b
        return start_b


class SSAForCausalLM(SSAPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - 4.57 reads the keys only

    def __init__(self, config):
        super().__init__(config)
        self.model = SSAModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_hidden_states=None,
        return_dict=None,
        logits_to_keep=0,
        inference_mode=None,
        block_count=None,
        trunk=None,
        num_items_in_batch=None,
        cache=None,
        **kwargs,
    ):
        """Logits [B, T, V] and, with `labels`, the loss: cross-entropy (training ssa: + alignment_weight * alignment).

        `trunk` ("full" or "sparse") is `inference_mode` by its name in training: which stream feeds the residual. ssa in
        training with neither draws it, sparse with probability `sparse_probability`, from torch's CPU generator.
        `num_items_in_batch` is what transformers' Trainer passes when it accumulates gradients: the loss is then
        divided by it.
        """
        if trunk is not None and inference_mode not in (None, trunk):
            raise ValueError(f"trunk={trunk!r} and inference_mode={inference_mode!r} contradict each other")
        mode = trunk or inference_mode
        align = self.training and labels is not None and self.config.aligned
        if align and mode is None:
            mode = "sparse" if torch.rand(()).item() < self.config.sparse_probability else "full"
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            inference_mode=mode,
            block_count=block_count,
            with_alignment=align,
            **kwargs,
        )
        x = output.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep  # 0 keeps all
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None:
            targets = labels[:, 1:].to(logits.device)
            scores = wide(logits[:, :-1]).flatten(0, 1)
            counted = (targets != -100).sum()
            divisor = counted if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(scores, targets.flatten(), ignore_index=-100, reduction="sum") / divisor
            if align:
                loss = loss + self.config.alignment_weight * output.alignment_loss * (counted / divisor)
        result = SSACausalLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=output.hidden_states,
            alignment_loss=output.alignment_loss,
            **{CACHE: getattr(output, CACHE)},
        )
        return result if asked(return_dict, self.config, "return_dict") else result.to_tuple()

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, inputs_embeds=None, cache=None, **kwargs
    ):
        """The tokens the cache has not seen. Positions come from the mask, so transformers' own are dropped."""
        past_key_values = one_cache(past_key_values, cache)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        told = kwargs.pop("next_sequence_length", None)
        for name in ("cache_position", "position_ids", "is_first_iteration"):
            kwargs.pop(name, None)
        inputs = {"past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs}
        if inputs_embeds is not None and past == 0:
            inputs["inputs_embeds"] = inputs_embeds
        else:
            if attention_mask is not None:
                new = attention_mask.shape[1] - past
            else:  # after a prompt of embeddings, input_ids hold fewer tokens than the cache; transformers 5 gives no mask then
                new = told or input_ids.shape[1] - past
            inputs["input_ids"] = input_ids[:, -new:].contiguous()
        return inputs


SSAConfig.register_for_auto_class()
SSAModel.register_for_auto_class("AutoModel")
SSAForCausalLM.register_for_auto_class("AutoModelForCausalLM")
