"""Configuration of an SSA language model: a Llama block whose attention is a sum of streams, each with a gate per query head.

RoPE settings are kept as `rope_parameters` (one dict with `rope_type` and `rope_theta`), which transformers 4.57 and
5.x both round-trip; `rope_theta` and `rope_scaling` are accepted and can be read back. An unknown attention kind,
inference mode, top-k rule or RoPE type is a ValueError; `dynamic` and `longrope` are unknown on purpose: their frequencies
change with the length, and cached keys were rotated with other ones. This file is copied into exported folders, so it imports
transformers only.
"""

from transformers import PretrainedConfig

STREAMS = ("full", "sparse", "compressed", "window", "trunk")
"""`trunk` is full or sparse as the mode says, and in training both, with an alignment loss between them."""
KINDS = {
    "full": ("full",),
    "moba": ("sparse",),
    "nsa": ("compressed", "sparse", "window"),
    "ssa": ("trunk",),
}
"""The streams of each attention kind, a gate each. For other kinds config.json gives `streams`."""
MODES = ("full", "sparse")
TOPK = ("exact", "reference")
OLD_TOPK = {"authors": "reference"}
SPARSE_BACKENDS = ("auto", "torch")
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
ROPE_MAY_HAVE = {"yarn": ("original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate")}


def checked_rope(given, theta):
    """The settings with `rope_type` and `rope_theta` filled in. What a type needs must be there, and nothing else."""
    rope = dict(given)
    old_name = rope.pop("type", None)
    if "rope_type" not in rope and old_name is None and "factor" in rope:
        raise ValueError(f"rope_scaling has a factor and no rope_type: one of {', '.join(ROPE_NEEDS)}")
    rope.setdefault("rope_type", old_name or "default")
    rope.setdefault("rope_theta", float(theta))
    kind = check_choice("rope_type", rope["rope_type"], tuple(ROPE_NEEDS))
    if rope.get("partial_rotary_factor") == 1.0:
        del rope["partial_rotary_factor"]
    missing = [key for key in ROPE_NEEDS[kind] if key not in rope]
    unknown = rope.keys() - {"rope_type", "rope_theta", *ROPE_NEEDS[kind], *ROPE_MAY_HAVE.get(kind, ())}
    if missing or unknown:
        said = f"needs {missing[0]}" if missing else f"has no {min(unknown)}"
        raise ValueError(f"rope_type={kind!r} {said}")
    return rope


def check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(choices)}")
    return value


class SSAConfig(PretrainedConfig):
    """See the arguments' names; sizes are those of the paper's 1B model where no value is given.

    `block_size` tokens make a block and each token attends to `block_count` of them in sparse mode, its own included.
    `window` (tokens) is used by the window stream; `alignment_weight` and `sparse_probability` (how often the residual
    follows the sparse stream) by `ssa` in training. `streams` are those of an `attention_kind` that KINDS does not list,
    in the order of their gates. `inference_mode` is what a forward runs unless it is told otherwise: "full" attends to
    everything, "sparse" to the selected blocks; None means the mode that the kind trains in: sparse for moba and nsa, full
    for kinds with a full stream. `sparse_backend` "auto" runs sparse attention without
    gradients in the Triton kernels beside this file, where there is an NVIDIA GPU and triton; "torch" in PyTorch everywhere.
    """

    model_type = "ssa"
    streams = None
    # what Trainer must not gather as a prediction, by both its names (5.24 renamed it)
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 - an annotation makes it a field in 5.x

    def __init__(
        self,
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        rope_scaling=None,
        rope_parameters=None,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        attention_kind="ssa",
        streams=None,
        block_size=16,
        block_count=16,
        topk="exact",
        window=128,
        alignment_weight=10.0,
        sparse_probability=0.5,
        inference_mode=None,
        sparse_backend="auto",
        use_cache=True,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.attention_kind = attention_kind
        if streams is not None and tuple(streams) != KINDS.get(attention_kind):
            self.streams = list(streams)
        self.block_size = block_size
        self.block_count = block_count
        self.topk = topk
        self.window = window
        self.alignment_weight = alignment_weight
        self.sparse_probability = sparse_probability
        self.inference_mode = inference_mode
        self.sparse_backend = sparse_backend
        self.use_cache = use_cache
        if num_attention_heads % num_key_value_heads:
            raise ValueError(f"num_key_value_heads={num_key_value_heads} must divide {num_attention_heads} query heads")
        self.check_attention()
        if inference_mode is None:
            self.inference_mode = "full" if {"full", "trunk"} & set(self.gated_streams) else "sparse"
        # `rope_parameters` wins: it is what a saved config holds, and what transformers 5 renames `rope_scaling` to.
        self.rope_parameters = checked_rope(rope_parameters or rope_scaling or {}, rope_theta)
        self.rope_theta = self.rope_parameters["rope_theta"]
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **kwargs,
        )
        # transformers 5 no longer keeps these two as common attributes of every config
        self.tie_word_embeddings = tie_word_embeddings
        self.bos_token_id, self.eos_token_id, self.pad_token_id = bos_token_id, eos_token_id, pad_token_id

    def check_attention(self):
        """Raises ValueError for what no forward can run."""
        if self.attention_kind in KINDS:
            if self.streams is not None:
                raise ValueError(f"attention_kind={self.attention_kind!r} does not have the streams {self.streams}")
        elif not self.streams:
            known = ", ".join(KINDS)
            raise ValueError(f"attention_kind={self.attention_kind!r} is not one of {known}, and streams are not given")
        for name in self.gated_streams:
            check_choice("streams", name, STREAMS)
        self.topk = check_choice("topk", OLD_TOPK.get(self.topk, self.topk), TOPK)
        if self.inference_mode is not None:
            check_choice("inference_mode", self.inference_mode, MODES)
        check_choice("sparse_backend", self.sparse_backend, SPARSE_BACKENDS)
        if min(self.block_size, self.block_count, self.window) < 1:
            sizes = f"block_size={self.block_size}, block_count={self.block_count} and window={self.window}"
            raise ValueError(f"{sizes} must be at least 1")

    @property
    def gated_streams(self):
        """The attention kind's streams, in the order of their gates."""
        return KINDS.get(self.attention_kind) or tuple(self.streams)

    @property
    def gates(self):
        """Gates per query head."""
        return len(self.gated_streams)

    @property
    def aligned(self):
        """Whether training adds an alignment loss."""
        return "trunk" in self.gated_streams

    def computed_streams(self, mode):
        """What a forward in `mode` computes for each gate: `full`, `sparse`, `compressed` or `window`.

        The mode decides a trunk. Sparse mode also replaces full attention; full mode replaces sparse attention, but not in a
        kind that has both: full mode is how it trains.
        """
        if mode == "sparse":
            decided = ("trunk", "full")
        else:
            decided = ("trunk",) if "full" in self.gated_streams else ("trunk", "sparse")
        return [mode if name in decided else name for name in self.gated_streams]

    @property
    def rope_scaling(self):
        """How positions are scaled for contexts longer than trained on, or None."""
        return None if self.rope_parameters["rope_type"] == "default" else dict(self.rope_parameters)

    @rope_scaling.setter
    def rope_scaling(self, value):
        """What `from_pretrained(folder, rope_scaling={...})` does: the base stays, the scaling is replaced."""
        self.rope_parameters = checked_rope(value or {}, self.rope_theta)
