"""Decoding an exported model with this project's kernels: caches with pooled keys, one CUDA graph a step.

The model's own weights and modules, with attention over `ssa_kernels.KVCache`s in place of the transformers cache; a step gives
the logits that the model's forward gives, and in sparse mode reads the pooled keys and the selected blocks only. It serves
kinds with one gate over full or sparse attention. Other kinds, whose streams have no cached kernel, are refused; transformers
decodes them.
"""

import torch
from torch import Tensor

from ssa_kernels import BlockSpec, KVCache, cached_attention
from ssa_megatron.errors import ConfigError
from ssa_megatron.hf.bundle.configuration_ssa import MODES
from ssa_megatron.hf.bundle.positions_ssa import rotary_table, rotate, wide


def decodes(config) -> bool:
    """Whether `Decoder` serves models of this SSAConfig, in every mode."""
    return all(config.computed_streams(mode) == [mode] for mode in MODES)


class Decoder:
    """One batch being continued. Feed the prompts with `prefill`, then one token a row with `step`."""

    def __init__(self, model, batch: int, capacity: int, *, mode: str | None = None, block_count: int | None = None):
        """model: SSAForCausalLM. capacity: tokens a row may come to, prompt included. Raises ConfigError for a model
        that `decodes` does not accept."""
        c = model.config
        if not decodes(c):
            raise ConfigError(
                f"attention_kind={c.attention_kind} has no cached kernels",
                remedy="generate with transformers instead",
                id="kind-not-cached",
            )
        self.model, self.config, self.mode = model, c, mode or c.inference_mode
        self.spec = BlockSpec(c.block_size, block_count or c.block_count, c.topk)
        embeddings = model.get_input_embeddings().weight
        kind = {"block_size": c.block_size, "dtype": embeddings.dtype, "device": embeddings.device}
        self.caches = [
            KVCache(batch, capacity, c.num_key_value_heads, c.head_dim, **kind) for _ in range(c.num_hidden_layers)
        ]
        self._graph = self._token = self._logits = None

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self.caches[0].host_lengths)

    @property
    def cache_bytes(self) -> int:
        """Memory of keys, values and pooled keys."""
        return sum(x.nbytes for cache in self.caches for x in (cache.keys, cache.values, cache.pooled))

    def traffic(self, length: int) -> int:
        """Bytes of cache that a step of the whole batch reads where each row holds `length` tokens."""
        c, cache = self.config, self.caches[0]
        token = cache.kv_heads * cache.head_dim * cache.dtype.itemsize
        read = 2 * length  # keys and values
        blocks = length // c.block_size
        if self.mode == "sparse" and self.spec.block_count <= blocks:
            read = blocks * cache.pooled.shape[2] + 2 * self.spec.block_count * c.block_size
        return read * token * cache.batch * len(self.caches)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor, counts: list[int] | None = None) -> Tensor:
        """int64 [B, T] prompts, padded on the left to T where `counts` tells each row's real tokens -> logits [B, V]."""
        return self._forward(tokens, counts)

    @torch.inference_mode()
    def step(self, tokens: Tensor) -> Tensor:
        """int64 [B], the newest token of each row -> logits [B, V] of the next. Overwritten by the next step on CUDA."""
        if not tokens.is_cuda:
            return self._forward(tokens[:, None], None)
        if self._graph is None:
            self._capture(tokens)
        for cache in self.caches:
            cache.reserve(1)
        self._token.copy_(tokens[:, None])
        self._graph.replay()
        return self._logits

    def _capture(self, tokens: Tensor) -> None:
        """One step as a CUDA graph. It runs once before, so that every kernel is compiled, and is then taken back."""
        lengths = list(self.caches[0].host_lengths)
        self._token = tokens[:, None].clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._forward(self._token, None)
            for cache in self.caches:
                cache.crop(lengths)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._logits = self._forward(self._token, None)
        self._graph = graph

    def _forward(self, tokens: Tensor, counts: list[int] | None) -> Tensor:
        """[B, T] new tokens -> [B, V] logits after the last. Every cache is appended to."""
        model, (batch, length) = self.model.model, tokens.shape
        x = model.embed_tokens(tokens)
        real = length if counts is None else torch.tensor(counts, device=x.device)[:, None]
        first = self.caches[0].lengths[:, None] + real - length
        position = (first + torch.arange(length, device=x.device)).clamp(min=0)
        table = [part.transpose(1, 2) for part in rotary_table(position, self.config, wide(x).dtype)]
        for layer, cache in zip(model.layers, self.caches, strict=True):
            attention, y = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                projection(y).view(batch, length, -1, self.config.head_dim)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            gate = torch.sigmoid(wide(attention.g_proj(y)))[..., None]
            cache.append(rotate(k, table), v, counts)
            output = gate * cached_attention(rotate(q, table), cache, self.spec, mode=self.mode)
            x = x + attention.o_proj(output.to(x.dtype).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.model.lm_head(model.norm(x[:, -1]))
