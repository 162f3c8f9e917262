"""The recipe: every setting of a run, typed and frozen, one class a section.

Unknown keys are errors, and each field's docstring gives its unit and, where there is one, the value to start from. What two
sections owe each other (heads against groups, rows against micro-batches) is checked here; what a topology may combine is
checked by `parallel/topology.py`.
"""

from typing import Literal, LiteralString, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from ssa_megatron.config.variants import SCHEDULES, KindName, LoggerName, OptimizerName, ScheduleName


def _broken(id: LiteralString, problem: str) -> PydanticCustomError:
    """A rule that the values break; `id` becomes the id of the ConfigError."""
    return PydanticCustomError(id, "{problem}", {"problem": problem})


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value, info):
        # pydantic reads true as 1, and a run of one step is not what anybody meant
        annotation = cls.model_fields[info.field_name].annotation
        kinds = get_args(annotation) or (annotation,)  # int | None, Literal[1, 2, 3]
        if isinstance(value, bool) and any(kind in (int, float) or type(kind) is int for kind in kinds):
            raise _broken("number-not-truth-value", "Input should be a number, not a truth value")
        return value


class RopeScaling(Section):
    """Llama-3 RoPE scaling for contexts longer than those trained on."""

    factor: float = Field(4.0, ge=1)
    """By how much the context grows."""
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)
    original_max_position_embeddings: int = Field(8192, ge=1)
    """Tokens; the context length trained on before scaling."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.high_freq_factor <= self.low_freq_factor:
            raise _broken(
                "rope-frequencies",
                f"high_freq_factor={self.high_freq_factor} must be greater than low_freq_factor={self.low_freq_factor}",
            )
        return self


class Model(Section):
    """The transformer. The paper's sizes are in docs/method.md, "Sizes of the paper's models"; ours in recipes/."""

    vocab_size: int = Field(ge=2)
    """Rows of the embedding; at least the tokenizer's number of pieces."""
    hidden_size: int = Field(ge=8)
    num_layers: int = Field(ge=1)
    num_heads: int = Field(ge=1)
    """Query heads."""
    num_kv_heads: int = Field(ge=1)
    """Key/value heads (query groups); divides `num_heads`."""
    head_dim: int = Field(ge=2)
    """Channels of one head; even, because RoPE turns pairs. 64 or 128 are fast."""
    ffn_size: int = Field(ge=8)
    """Hidden width of the SwiGLU MLP."""
    max_sequence_length: int = Field(ge=2)
    """Tokens; the context length the exported model announces."""
    rope_theta: float = Field(500000.0, gt=0)
    """Base of the rotary frequencies; 500000 in the paper's models."""
    rope_scaling: RopeScaling | None = None
    norm_eps: float = Field(1e-5, gt=0)
    tied_embeddings: bool = True
    """Whether the output layer uses the embedding matrix; tied in the paper's models."""
    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the normal distribution every matrix starts from."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.num_heads % self.num_kv_heads:
            raise _broken(
                "kv-heads-divide-heads", f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise _broken("head-dim-even", f"head_dim={self.head_dim} must be even: RoPE rotates pairs of channels")
        return self


class Attention(Section):
    """Which attention trains, and the sparse stream's shape (paper section 3)."""

    kind: KindName = "ssa"
    """`ssa`: full and sparse streams with alignment; `full`, `moba`: one stream; `nsa`: compressed, selected and window.
    One module each in `model/kinds/`."""
    block_size: int = Field(16, ge=1)
    """Tokens in a block; 16 in the paper."""
    block_count: int = Field(16, ge=1)
    """Blocks each token attends to, its own included; block_size * block_count is the receptive field."""
    topk: Literal["exact", "reference"] = "exact"
    """`reference` reproduces the approximate selection of the authors' kernel, to run their checkpoints as trained."""
    window: int = Field(128, ge=1)
    """Tokens of the sliding window; used by kinds with a window stream."""
    alignment_weight: float = Field(10.0, ge=0)
    """Alpha, the weight of the alignment loss; used by kinds that have one. 10 in the paper."""
    sparse_probability: float = Field(0.5, ge=0, le=1)
    """How often a micro-batch trains the trunk on the sparse stream; used by kinds with two trunks. 0.5 in the paper."""
    backend: Literal["auto", "triton", "torch"] = "auto"
    """Which implementation of `kernels` runs; `auto` is the fast one proven on the device at hand."""

    @field_validator("topk", mode="before")
    @classmethod
    def _old_spelling(cls, value):
        return "reference" if value == "authors" else value  # recipes, run folders and exports of version 0.0

    @model_validator(mode="after")
    def _consistent(self):
        if self.topk == "reference" and (self.block_size, self.block_count) != (16, 16):
            raise _broken(
                "topk-shape",
                f"topk=reference exists for block_size=16 and block_count=16 only, "
                f"not block_size={self.block_size}, block_count={self.block_count}",
            )
        return self


class Parallel(Section):
    """How the model is cut over processes. Data parallelism is what remains of the world."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel ranks; heads, MLP width and vocabulary are divided among them."""
    sequence: bool = False
    """Sequence parallelism: norms and residuals are divided over the tensor-parallel ranks. Recommended with tensor > 1."""
    pipeline: int = Field(1, ge=1)
    virtual_pipeline: int = Field(1, ge=1)
    context: int = Field(1, ge=1)


class Zero(Section):
    """DeepSpeed ZeRO: what is sharded over the data-parallel ranks."""

    stage: Literal[1, 2, 3] = 1
    """1: optimizer states. 2: gradients too. 3: parameters too."""
    offload_optimizer: bool = False
    """Masters and optimizer state live in host memory and are updated there (stage 2 or 3). Slower; with AdamW it saves 12 bytes
    per parameter of device memory, divided by the data-parallel size."""
    reduce_bucket_mb: int = Field(200, ge=1)
    """Megabytes of gradients reduced in one call."""


class DataPhase(Section):
    """Weights of the sources from a token count on, until the next phase."""

    from_tokens: int = Field(0, ge=0)
    """Tokens of the run; 0 for the first phase, e.g. 90 % of the run's tokens for an annealing phase."""
    weights: dict[str, float]
    """By source name; of any sum, 0 leaves a source out."""


class Data(Section):
    """The datasets written by `ssa data prepare`: one in `path`, or several in `sources`, mixed by `phases`."""

    path: str | None = None
    """Folder or s3:// prefix with dataset.json, train/ and validation/."""
    sources: dict[str, str] = {}
    """Instead of `path`: several datasets by name, e.g. {web: data/web, code: s3://bucket/code}."""
    phases: tuple[DataPhase, ...] = ()
    """Weights of the sources; without any, each source in proportion to its rows."""
    read_ahead: int = Field(2, ge=0, le=64)
    """Micro-batches read in advance by a thread; 0 reads when asked."""
    shuffle: bool = True
    shuffle_block: int = Field(1 << 18, ge=1)
    """Rows mixed with each other; reading spans the shards that hold them, so a small cache wants fewer."""
    cache: str | None = None
    """Folder on a local disk for the shards of remote datasets; ~/.cache/ssa-megatron by default."""
    cache_limit: int | None = Field(None, ge=1)
    """Bytes of shards kept in the cache; none is no limit."""
    stall_timeout: float = Field(20.0, gt=0)
    """Seconds for which training may be blocked on one shard while no bytes of it arrive (no connection, errors, silence); then
    it is an error. A read that never returns gets 5 seconds more. Time covered by prefetched rows does not count."""
    accept_changes: str | None = None
    """The reason why a run goes on although data, weights, seed or shuffle differ from its checkpoint's; kept there."""

    @model_validator(mode="before")
    @classmethod
    def _old_name(cls, values):
        if (
            not isinstance(values, dict) or "patience" not in values
        ):  # its name in 0.1.0 and in that release's run folders
            return values
        if "stall_timeout" in values:
            raise _broken(
                "stall-timeout-twice", "stall_timeout and patience, its old name, are both given; keep stall_timeout"
            )
        return {"stall_timeout" if key == "patience" else key: value for key, value in values.items()}

    @model_validator(mode="after")
    def _consistent(self):
        if self.path is not None and self.sources:
            raise _broken("path-and-sources", "path and sources are both given; name one dataset, or several")
        return self


class Optimizer(Section):
    """The optimizer and its settings. Matrices decay, norms do not."""

    kind: OptimizerName = "adamw"
    """`adamw`: Adam with decoupled weight decay."""
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    clip_grad_norm: float = Field(1.0, ge=0)
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""


class Schedule(Section):
    """The learning rate over optimizer steps."""

    kind: ScheduleName = Field(
        "cosine", validate_default=False
    )  # else importing this module would import the schedules
    """All warm up first. `cosine`: half a cosine; `wsd`: stay, then decay linearly over the last `decay_fraction` of the steps;
    `constant`: stay."""
    warmup_fraction: float = Field(0.01, ge=0, le=1)
    """Share of train.steps spent rising linearly from 0 to the peak."""
    decay_fraction: float = Field(0.2, ge=0, le=1)
    """Share of train.steps at the end over which `wsd` falls to min_lr_ratio."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""


class Train(Section):
    """The loop."""

    steps: int = Field(ge=1)
    """Optimizer steps of the whole run; the schedule spans them."""
    sequence_length: int = Field(ge=2)
    """Tokens in a packed row; the dataset must have been prepared with this row length."""
    global_batch_rows: int = Field(ge=1)
    """Rows of one optimizer step, over all data-parallel ranks and micro-batches."""
    micro_batch_rows: int = Field(ge=1)
    """Rows of one forward pass on one rank; what fits in memory."""
    seed: int = Field(1234, ge=0, lt=2**63)
    """Decides initial weights, order of samples and trunk draws."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 compute, fp32 gradient accumulation and fp32 master weights."""
    pointwise: Literal["plain", "fused"] = "plain"
    """Norms, SwiGLU, rotation, cross-entropy and gradient sums on CUDA: PyTorch's operators, or fused kernels. Fused steps take a
    third less time and need a quarter less memory than `ssa plan` states. A CPU runs the plain form."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What is recomputed in backward instead of kept: nothing, the attention core, or whole layers."""
    eval_interval: int = Field(0, ge=0)
    """Optimizer steps between evaluations on the validation split; 0 switches them off."""
    eval_rows: int = Field(64, ge=1)
    """Validation rows per evaluation, over all data-parallel ranks."""
    max_skipped_steps: int = Field(3, ge=1)
    """Steps in a row with a non-finite loss or gradient after which the run stops; each is skipped and counted."""
    deterministic: bool = False
    """Bitwise repeatable on CUDA too, at some cost in speed; on a CPU training always is."""


class Checkpoint(Section):
    interval: int = Field(100, ge=1)
    """Optimizer steps between checkpoints; the last step is always saved."""
    keep: int = Field(3, ge=1)
    """Newest committed checkpoints kept."""
    asynchronous: bool = True
    """Written by threads during the next step's forward and backward; false holds training until each is committed."""


class Logging(Section):
    interval: int = Field(1, ge=1)
    """Optimizer steps between console lines; metrics.jsonl gets every step."""
    tensorboard: bool = True
    wandb: str | None = Field(None, min_length=1)
    """Weights & Biases project, when `wandb` is installed; a run stays one run over all its starts."""
    loggers: dict[LoggerName, str] = {}
    """Loggers beyond the two above, by name, with the argument each takes."""

    @model_validator(mode="after")
    def _consistent(self):
        for name in self.loggers.keys() & type(self).model_fields.keys():
            raise _broken("logger-has-a-field", f"loggers: {name} is switched on by logging.{name}")
        return self


class Watchdog(Section):
    """Signs of life of every rank in RUN/heartbeats/, and how long silence and standstill are borne."""

    heartbeat: float = Field(1.0, ge=0.1, le=60)
    """Seconds between two signs of life; 5 for more than a thousand ranks on one file system."""
    silence: float = Field(60.0, ge=1)
    """Seconds without a sign of life from a rank (stopped, dead, its node lost) after which the job ends with exit code 8."""
    stuck: float = Field(300.0, ge=0)
    """Seconds in which no rank enters another phase, after which the job ends with exit code 8: longer than the longest
    evaluation, shorter than the 600 of a collective. 0 leaves it to the collectives."""

    @model_validator(mode="after")
    def _consistent(self):
        if self.silence < 3 * self.heartbeat + 2.5:
            raise _broken(
                "silence-too-short",
                f"silence={self.silence} is too short for heartbeat={self.heartbeat}: 3 of them and 2.5 s",
            )
        return self


class Recipe(Section):
    """A whole run. `name` names the run folder where none is given."""

    name: str = Field(min_length=1)
    model: Model
    attention: Attention = Attention()
    parallel: Parallel = Parallel()
    zero: Zero = Zero()
    data: Data = Data()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    watchdog: Watchdog = Watchdog()

    @model_validator(mode="after")
    def _consistent(self):
        train = self.train
        if train.global_batch_rows % train.micro_batch_rows:
            raise _broken(
                "micro-batch-divides",
                f"train.micro_batch_rows={train.micro_batch_rows} must divide "
                f"train.global_batch_rows={train.global_batch_rows}",
            )
        if train.sequence_length > self.model.max_sequence_length:
            raise _broken(
                "row-longer-than-model",
                f"train.sequence_length={train.sequence_length} is longer than "
                f"model.max_sequence_length={self.model.max_sequence_length}",
            )
        if broken := SCHEDULES[self.schedule.kind].broken_rule(self):
            raise _broken(*broken)
        return self
