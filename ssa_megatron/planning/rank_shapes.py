"""Sizes on one rank, and the parameters that each pipeline stage holds, from the recipe alone.

Tensor-parallel ranks of a stage hold equally much (the vocabulary is padded to their number); stages differ only by the
embedding and the output layer. It refuses nothing: ask `parallel.topology.check` first.
"""

import math
from dataclasses import dataclass

from ssa_megatron.config import Recipe
from ssa_megatron.model.kinds import kind_of
from ssa_megatron.model.shapes import padded_vocab_size
from ssa_megatron.parallel import topology

# A copy of a constant of kernels/ssa_kernels/triton/tiles.py, which imports torch; a test compares them
VENDOR_TOKENS = {64: 16384, 128: 0}


@dataclass(frozen=True)
class RankShapes:
    """Sizes on one rank. Widths are channels of one token, tokens those of one micro-batch."""

    element: int
    """Bytes of a weight or an activation: 2 in bf16, 4 in fp32."""
    hidden: int
    query: int
    """Query heads of this rank times head width."""
    key: int
    """Key/value heads of this rank times head width; a head shared by several ranks counts on each."""
    heads: int
    kv_heads: int
    gates: int
    ffn: int
    vocabulary: int
    """Columns of this rank's logits, padding included."""
    tokens: int
    """Tokens of a micro-batch that this rank attends with."""
    key_tokens: int
    """Tokens of a micro-batch that it attends to: all of the row's under context parallelism."""
    stream_tokens: int
    """Tokens of the residual stream it holds: a share of `tokens` under sequence parallelism."""
    rows: int
    layers: int
    """Layers of one pipeline stage."""
    shards: int
    """Ranks ZeRO cuts states over: data- times context-parallel."""
    micro_batches: int
    document: int
    """Tokens of a typical document in a row."""
    vendor: bool
    """Full attention runs in the vendor's kernel, which supports neither documents nor query positions."""

    @property
    def head_dim(self) -> int:
        return self.query // self.heads

    @property
    def row(self) -> int:
        """Tokens of a row that this rank attends to: the sequence length."""
        return self.key_tokens // self.rows


def rank_shapes(recipe: Recipe, world: int, *, document: int | None = None) -> RankShapes:
    """The sizes of `recipe` on each of `world` ranks; `document`: tokens of a typical one, None for one document a row."""
    m, p, train = recipe.model, recipe.parallel, recipe.train
    data = topology.data_parallel_size(recipe, world)
    row = train.sequence_length * train.micro_batch_rows
    tokens = row // p.context
    kv_heads = max(1, m.num_kv_heads // p.tensor)
    document = min(document or train.sequence_length, train.sequence_length)
    return RankShapes(
        element=2 if train.precision == "bf16" else 4,
        hidden=m.hidden_size,
        query=m.num_heads // p.tensor * m.head_dim,
        key=kv_heads * m.head_dim,
        heads=m.num_heads // p.tensor,
        kv_heads=kv_heads,
        gates=m.num_heads // p.tensor * kind_of(recipe).gates,
        ffn=m.ffn_size // p.tensor,
        vocabulary=padded_vocab_size(recipe) // p.tensor,
        tokens=tokens,
        key_tokens=row,
        stream_tokens=tokens // p.tensor if p.sequence else tokens,
        rows=train.micro_batch_rows,
        layers=m.num_layers // p.pipeline,
        shards=data * p.context,
        micro_batches=topology.micro_batches(recipe, world),
        document=document,
        vendor=document == train.sequence_length and _vendor_attends(recipe),
    )


def _vendor_attends(recipe: Recipe) -> bool:
    """Whether rows of one document go to the vendor's kernel (kernels/ssa_kernels/triton/backend.py)."""
    m, train = recipe.model, recipe.train
    takes = train.precision == "bf16" and recipe.attention.backend != "torch" and not train.deterministic
    enough = train.micro_batch_rows * train.sequence_length >= VENDOR_TOKENS.get(m.head_dim, math.inf)
    return takes and enough and recipe.parallel.context == 1


@dataclass(frozen=True)
class Parameters:
    """Elements of each parameter one rank of a stage holds."""

    embeddings: tuple[int, ...]
    """Input embedding and output layer, or the one or none of them that this stage holds."""
    layers: tuple[int, ...]
    """Matrices of its layers."""
    vectors: tuple[int, ...]
    """Norms: the same on every tensor-parallel rank, and not decayed, so ZeRO flattens them apart from the matrices."""

    @property
    def matrices(self) -> tuple[int, ...]:
        return self.embeddings + self.layers

    @property
    def count(self) -> int:
        return sum(self.matrices) + sum(self.vectors)

    @property
    def largest(self) -> int:
        return max(self.matrices)


def parameters(recipe: Recipe, stage: int) -> Parameters:
    """What a rank of pipeline stage `stage` holds; a tied embedding is held by the first and by the last stage."""
    m, p = recipe.model, recipe.parallel
    first, last = stage == 0, stage == p.pipeline - 1
    layers = m.num_layers // p.pipeline
    # equal shares, also where ranks share a key/value head
    qkv_rows = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim // p.tensor
    layer = (
        m.hidden_size * m.num_heads * m.head_dim // p.tensor,  # output projection
        qkv_rows * m.hidden_size,
        m.num_heads * kind_of(recipe).gates // p.tensor * m.hidden_size,
        2 * m.ffn_size // p.tensor * m.hidden_size,
        m.ffn_size // p.tensor * m.hidden_size,
    )
    embedding = padded_vocab_size(recipe) // p.tensor * m.hidden_size
    copies = first + last if p.pipeline > 1 or not m.tied_embeddings else 1
    return Parameters((embedding,) * copies, layer * layers, vectors=(m.hidden_size,) * (2 * layers + last))
