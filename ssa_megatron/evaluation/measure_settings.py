"""What an evaluation does, checked before anything is loaded: parts, lengths, budgets, sizes, seed, precision.

Two evaluations are comparable when their settings and the sha256 of their texts are equal. It refuses unknown parts and
sizes that mean nothing.
"""

import dataclasses
from collections.abc import Sequence

from ssa_megatron.errors import ConfigError

PARTS = ("budget", "length", "needle", "attention", "tasks")
DTYPES = ("bf16", "fp16", "fp32")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of `ssa evaluate`; lengths are in the model's own tokens."""

    parts: tuple[str, ...] = PARTS[:-1]
    lengths: tuple[int, ...] = ()
    """Edges of the length buckets and contexts of the needle; empty: 1/2, 1, 2 and 4 times the training length."""
    budgets: tuple[int | str, ...] = (1, 2, 4, 8, 16, "all")
    """Block counts of sparse attention; "all" covers the training length, where sparse equals full."""
    tokens: int = 65536
    """Scored at each budget, at most."""
    sequences: int = 8
    """Of the longest length, for the length buckets, and of the training length, for the attention; at most."""
    haystacks: int = 1
    """For each context and depth; each is asked once with every candidate as the answer."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where the needle stands: 0 is the beginning of the haystack, 1 its end."""
    candidates: int = 8
    """Answers that a needle's is ranked among, itself included: as many needles a haystack."""
    rope_factor: float | None = None
    """Llama-3 RoPE scaling by this factor (low 1, high 4, original length: the training length); None: as trained."""
    tasks: tuple[str, ...] = ()
    """Of lm-eval: names, YAML files, or JSON-lines files (see tasks.py)."""
    task_batch: int = 8
    """Rows lm-eval gives the model at once."""
    few_shot: int = 0
    """Examples before each question of a task."""
    limit: int | None = None
    """Documents of a task; None: all."""
    batch_tokens: int = 8192
    """Of a forward; a longer sequence is a batch of its own."""
    seed: int = 0
    dtype: str | None = None
    """Precision of the weights; None: as stored."""

    def __post_init__(self):
        for part in self.parts:
            _need(part in PARTS, "--parts", part, f"use {', '.join(PARTS)}")
        _need(bool(self.parts), "--parts", "nothing", f"use {', '.join(PARTS)}")
        _need("tasks" not in self.parts or bool(self.tasks), "--parts", "tasks", "name them: --tasks piqa,my.jsonl")
        ascending = all(a < b for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        _need(
            ascending and min(self.lengths, default=2) >= 2, "--lengths", self.lengths, "give ascending numbers from 2"
        )
        _need(bool(self.budgets), "--budgets", "nothing", "give block counts, as 4,8,16,all")
        for count in self.budgets:
            _need(
                count == "all" or (isinstance(count, int) and count >= 1), "--budgets", count, "use 1 and more, or all"
            )
        for name in ("tokens", "sequences", "haystacks", "batch_tokens", "task_batch"):
            _need(getattr(self, name) >= 1, f"--{name.replace('_', '-')}", getattr(self, name), "use at least 1")
        _need(2 <= self.candidates <= 32, "--candidates", self.candidates, "use 2 to 32")
        for depth in self.depths:
            _need(0 <= depth <= 1, "--depths", depth, "use shares of the haystack, 0 to 1")
        _need(bool(self.depths), "--depths", "nothing", "give shares of the haystack, as 0,0.5,1")
        _need(self.rope_factor is None or self.rope_factor >= 1, "--rope-factor", self.rope_factor, "use 1 and more")
        _need(self.few_shot >= 0, "--few-shot", self.few_shot, "use 0 and more")
        _need(self.limit is None or self.limit >= 1, "--limit", self.limit, "use 1 and more")
        _need(self.dtype in (None, *DTYPES), "--dtype", self.dtype, f"use {', '.join(DTYPES)}")

    def for_length(self, trained: int) -> "Settings":
        """Default lengths filled in for a model that was trained on sequences of `trained` tokens."""
        lengths = self.lengths or tuple(max(2, trained * share // 2) for share in (1, 2, 4, 8))
        return dataclasses.replace(self, lengths=lengths)

    def to_dict(self) -> dict:
        """As results hold it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}


def numbers(text: str, option: str, kind: type = int, words: Sequence[str] = ()) -> tuple:
    """`1,2,all` as numbers and the words allowed among them. Raises ConfigError."""
    found = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            found.append(item if item in words else kind(item))
        except ValueError:
            allowed = f" or {', '.join(words)}" if words else ""
            raise ConfigError(
                f"{option}: {item!r} is not a number",
                remedy=f"give numbers{allowed}, as 1,2",
                id="setting-not-a-number",
            ) from None
    return tuple(found)


def _need(good: bool, option: str, value: object, remedy: str) -> None:
    if not good:
        raise ConfigError(f"{option}: {value} cannot be", remedy=remedy, id="evaluation-setting")
