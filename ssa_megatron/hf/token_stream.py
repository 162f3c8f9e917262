"""Text as it is made, token by token, with what it cost: `ssa generate`, from arguments, a pipe or a terminal.

One prompt at a time, in either inference mode. On CUDA the project's kernels decode the kinds that decode.py serves, else the
exported class with its own cache; both give the logits of the model's forward. Text goes to standard output and nothing else
does; figures go to standard error.
"""

import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache

from ssa_megatron.errors import ConfigError, DataProblem
from ssa_megatron.hf.decode import Decoder, decodes
from ssa_megatron.hf.generate import check_attention, open_folder

HELP = "a line is a prompt; /mode full|sparse, /blocks N, an empty line or Ctrl-D ends"


@dataclass(frozen=True)
class Settings:
    """How to continue: `mode` and `block_count` None are the folder's own; `temperature` 0 is greedy."""

    mode: str | None = None
    block_count: int | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_attention(self.mode, self.block_count)
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens={self.max_new_tokens} must be at least 1", id="stream-max-new-tokens")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature={self.temperature}, top_p={self.top_p}",
                remedy="temperature >= 0 and 0 < top_p <= 1",
                id="stream-sampling",
            )


class CachedModel:
    """The exported class with its own cache, in the interface of `decode.Decoder`, for one row."""

    def __init__(self, model, *, mode: str, block_count: int | None):
        self.model, self.cache = model, DynamicCache()
        self.attention = {"inference_mode": mode, "block_count": block_count}

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """int64 [1, T] -> [1, V]."""
        output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **self.attention)
        return output.logits[:, -1]

    def step(self, tokens: Tensor) -> Tensor:
        """int64 [1] -> [1, V]."""
        return self.prefill(tokens[:, None])

    @property
    def cache_bytes(self) -> int:
        layers = self.cache.layers
        return sum(x.nbytes for layer in layers for x in (layer.keys, layer.values, *(layer.pooled or ())))


class Continuation:
    """Iterate for pieces of text; then `figures` says what it took."""

    def __init__(self, model, tokenizer, prompt: str, settings: Settings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.mode = settings.mode or model.config.inference_mode
        self.tokens: list[int] = []
        # not verbose: a prompt longer than training's would be said to end in indexing errors, and does not
        self._prompt = tokenizer(_utf8(prompt), return_tensors="pt", verbose=False)["input_ids"].to(model.device)
        self._prefill_s = self._decode_s = 0.0
        self._decoder = None

    def __iter__(self) -> Iterator[str]:
        s, model = self.settings, self.model
        generator = torch.Generator(model.device).manual_seed(s.seed)
        self._decoder = self._make_decoder()
        began, shown = time.perf_counter(), 0
        logits = self._decoder.prefill(self._prompt)
        while True:
            token = pick(logits, s.temperature, s.top_p, generator)
            number = token.item()  # waits for the device: what is timed is done
            now = time.perf_counter()
            if self.tokens:
                self._decode_s += now - began
            else:
                self._prefill_s = now - began
            if number == model.config.eos_token_id:
                break
            self.tokens.append(number)
            text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
            if not self._spelt_in_bytes(number) and not text.endswith("\ufffd"):  # else a character is half-way through
                yield text[shown:]
                shown = len(text)
            if len(self.tokens) == s.max_new_tokens:
                break
            began = time.perf_counter()
            logits = self._decoder.step(token)
        yield self.tokenizer.decode(self.tokens, skip_special_tokens=True)[shown:]

    def _spelt_in_bytes(self, token: int) -> bool:
        """Byte pieces are decoded together, up to the next other piece: until then their text may still change.

        A row that only pads the embedding to a round size has no piece (None) and no text.
        """
        return re.fullmatch(r"<0x[0-9A-F]{2}>", self.tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _make_decoder(self):
        s = self.settings
        if self.model.device.type == "cuda" and decodes(self.model.config):
            return Decoder(self.model, 1, self.reach, mode=self.mode, block_count=s.block_count)
        return CachedModel(self.model, mode=self.mode, block_count=s.block_count)

    @property
    def reach(self) -> int:
        """Tokens of the prompt and of the longest text that may follow."""
        return self._prompt.shape[1] + self.settings.max_new_tokens

    @property
    def figures(self) -> str:
        """One line: tokens, speed after the prompt, memory of the cache."""
        made, prompt = len(self.tokens), self._prompt.shape[1]
        blocks = self.settings.block_count or self.model.config.block_count
        mode = f"{self.mode}, {blocks} blocks" if self.mode == "sparse" else self.mode
        speed = (
            f"{(made - 1) / self._decode_s:.1f} tokens/s" if made > 1 and self._decode_s else "no token after the first"
        )
        megabytes = self._decoder.cache_bytes / 1e6
        return f"{mode}: prompt {prompt} in {self._prefill_s:.2f} s, {made} new, {speed}, cache {megabytes:.2f} MB"


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """[1, V] -> [1]: the likeliest, or drawn from the smallest set of tokens that holds `top_p` of the probability."""
    if temperature == 0:
        return logits.argmax(-1)
    share, order = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    share = share.masked_fill(share.cumsum(-1) - share >= top_p, 0.0)
    return order.gather(-1, torch.multinomial(share, 1, generator=generator))[:, 0]


def run(target: Path, prompts: Iterable[str], settings: Settings, *, device: str | None = None) -> None:
    """Continue each prompt; none given: lines of standard input, asked for where it is a terminal.

    target: an exported folder, or a run, which is exported to a temporary folder first. Raises SSAError.
    """
    with ExitStack() as stack:
        folder = target
        if (target / "checkpoints").is_dir():
            from ssa_megatron.hf.export import export

            _say(f"{target} is a run: exporting its newest checkpoint to a temporary folder")
            folder = export(target, Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model")
        model, tokenizer = open_folder(folder, device=device or ("cuda" if torch.cuda.is_available() else "cpu"))
        interactive = not prompts and sys.stdin.isatty()
        if interactive:
            _say(HELP)
        for line in prompts or _lines(interactive):
            settings, said = _command(settings, line) if interactive else (settings, None)
            if said:
                _say(said)
                continue
            _continue(model, tokenizer, line, settings)


def _continue(model, tokenizer, prompt: str, settings: Settings) -> None:
    made = Continuation(model, tokenizer, prompt, settings)
    if made.reach > model.config.max_position_embeddings:
        _say(f"up to {made.reach} tokens; the model was trained on {model.config.max_position_embeddings}")
    for piece in made:
        print(piece, end="", flush=True)
    print(flush=True)
    _say(made.figures)


def _lines(interactive: bool) -> Iterator[str]:
    """Of standard input, without their ends; a terminal's end with an empty one, a pipe's empty ones are passed over."""
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise _not_utf8(str(error)) from None
        if not line or (interactive and not line.strip()):
            return
        if line.strip():
            yield line.rstrip("\n")


def _utf8(text: str) -> str:
    """The text. Raises DataProblem for bytes that Python let through as lone surrogates, as it does in the C locale."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _not_utf8(ascii(text[:60])) from None
    return text


def _not_utf8(what: str) -> DataProblem:
    return DataProblem(f"a prompt is not UTF-8 text ({what})", remedy="convert it first", id="prompt-not-utf8")


def _command(settings: Settings, line: str) -> tuple[Settings, str | None]:
    """The settings after a line that may be a command, and what to answer to one."""
    name, _, value = line.strip().partition(" ")
    if name not in ("/mode", "/blocks"):
        return settings, HELP if name.startswith("/") else None
    values = settings.__dict__ | ({"mode": value} if name == "/mode" else {"block_count": _number(value)})
    try:
        changed = Settings(**values)
    except ConfigError as error:
        return settings, error.problem
    return changed, f"mode {changed.mode or 'of the folder'}, blocks {changed.block_count or 'of the folder'}"


def _number(text: str) -> int:
    return int(text) if text.strip().isdigit() else 0


def _say(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
