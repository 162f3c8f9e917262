"""Global names: what each local parameter of a Megatron model is a part of, whatever the topology.

A local parameter is a concatenation of slabs; each slab is a rectangle of one globally named tensor
(docs/checkpoint-format.md, "Global names").
Fused projections (q/k/v per query group, gate/up) and tensor-parallel cuts are undone here and nowhere else; padding rows of
the vocabulary belong to no slab.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ssa_megatron.config import Recipe
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.model.shapes import global_shapes, padded_vocab_size
from ssa_megatron.parallel.state import ParallelState

if TYPE_CHECKING:
    from ssa_megatron.model.build import SSAModel


@dataclass(frozen=True)
class Slab:
    """A rectangle of a global tensor that is contiguous (row-major) in a local parameter, from element `start` on."""

    name: str
    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class NamedParameter:
    """A local parameter and the slabs of global tensors it is made of."""

    parameter: nn.Parameter
    slabs: tuple[Slab, ...]
    replicated: bool
    """Every tensor-parallel rank holds the same values."""
    tied: bool
    """The first and the last pipeline stage hold a copy each: a tied embedding."""
    tied_copy: bool
    """This is the last stage's."""


def named_parameters(model: "SSAModel", recipe: Recipe, parallel: ParallelState) -> Iterator[NamedParameter]:
    """Every parameter of this rank's model with its slabs, in the model's own (deterministic) order."""
    spread = recipe.model.tied_embeddings and parallel.pp_size > 1
    for chunk in model.chunks:
        layer_numbers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for local_name, parameter in chunk.named_parameters():
            match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", local_name)
            prefix, leaf = (f"model.layers.{layer_numbers[int(match[1])]}.", match[2]) if match else ("", local_name)
            slabs = _slabs(leaf, prefix, recipe, parallel.tp_rank, parallel.tp_size)
            yield NamedParameter(
                parameter,
                tuple(slabs),
                replicated=leaf.endswith("norm.weight"),
                tied=spread and leaf in ("embedding.word_embeddings.weight", "output_layer.weight"),
                tied_copy=spread and leaf == "output_layer.weight",
            )


def _slabs(leaf: str, prefix: str, recipe: Recipe, rank: int, size: int) -> Iterator[Slab]:
    m = recipe.model
    shapes = global_shapes(recipe)

    def rows(name: str, first: int, count: int, start_row: int = 0) -> Slab:
        shape = shapes[name]
        return Slab(name, shape, (first, *(0 for _ in shape[1:])), (count, *shape[1:]), start_row * m.hidden_size)

    def columns(name: str) -> Slab:
        height, width = shapes[name]
        share = width // size
        return Slab(name, (height, width), (0, rank * share), (height, share), 0)

    def whole(name: str) -> Slab:
        return Slab(name, shapes[name], (0,), shapes[name], 0)

    match leaf:
        case "embedding.word_embeddings.weight" | "output_layer.weight":
            untied_head = leaf.startswith("output") and not m.tied_embeddings
            name = "lm_head.weight" if untied_head else "model.embed_tokens.weight"
            share = padded_vocab_size(recipe) // size
            first = rank * share
            count = min(share, m.vocab_size - first)
            if count > 0:
                yield rows(name, first, count)
        case "input_layernorm.weight":
            yield whole(prefix + "input_layernorm.weight")
        case "pre_mlp_layernorm.weight":
            yield whole(prefix + "post_attention_layernorm.weight")
        case "decoder.final_layernorm.weight":
            yield whole("model.norm.weight")
        case "self_attention.linear_qkv.weight":  # per query group: its query heads, its key head, its value head
            # the ranks take equal shares of these rows, which may cut through a group, even through a head
            group_rows = m.num_heads // m.num_kv_heads * m.head_dim
            share = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim // size
            at = 0
            for group in range(m.num_kv_heads):
                for name, count in (("q", group_rows), ("k", m.head_dim), ("v", m.head_dim)):
                    low, high = max(at, rank * share), min(at + count, (rank + 1) * share)
                    if low < high:
                        first = group * count + low - at
                        yield rows(f"{prefix}self_attn.{name}_proj.weight", first, high - low, low - rank * share)
                    at += count
        case "self_attention.linear_gate.weight":
            share = m.num_heads * kind_of(recipe).gates // size
            yield rows(prefix + "self_attn.g_proj.weight", rank * share, share)
        case "self_attention.linear_proj.weight":
            yield columns(prefix + "self_attn.o_proj.weight")
        case "mlp.linear_fc1.weight":
            share = m.ffn_size // size
            yield rows(prefix + "mlp.gate_proj.weight", rank * share, share)
            yield rows(prefix + "mlp.up_proj.weight", rank * share, share, share)
        case "mlp.linear_fc2.weight":
            yield columns(prefix + "mlp.down_proj.weight")
        case _:
            raise AssertionError(f"parameter {prefix + leaf!r} has no global name")
