"""`ssa generate`: streamed text is the text, figures are apart from it, and a terminal's commands do what they say."""

import io
import os
import re
import subprocess
import sys

import pytest
import torch

from ssa_megatron.errors import CheckpointError, ConfigError, DataProblem
from ssa_megatron.hf import bare
from ssa_megatron.hf import token_stream as stream
from ssa_megatron.hf.decode import Decoder
from ssa_megatron.hf.generate import open_folder
from ssa_megatron.hf.token_stream import Continuation, Settings
from tests.errors import raises


@pytest.fixture(scope="module")
def opened(folder):
    return open_folder(folder)


@pytest.mark.parametrize("mode", ["full", "sparse"])
def test_streamed_pieces_are_the_greedy_text_of_generate(opened, mode):
    prompts = ["The model", "    return value", "\u00e9\U0001f600 and"]
    want = bare.generate_texts(*opened, prompts, mode=mode, max_new_tokens=40)
    for prompt, text in zip(prompts, want, strict=True):
        made = Continuation(*opened, prompt, Settings(mode=mode, max_new_tokens=40))
        pieces = list(made)
        assert "".join(pieces) == text
        assert len(pieces) > 10
        assert len(made.tokens) == 40


def test_a_row_of_the_embedding_that_no_piece_belongs_to_is_streamed_as_nothing(opened, monkeypatch):
    """Regression: lost: `ssa generate` ended in a TypeError when an untrained model chose a padding row of its embedding."""
    model, tokenizer = opened
    padding = model.config.vocab_size - 1
    assert tokenizer.convert_ids_to_tokens(padding) is None
    chosen = iter([padding, *tokenizer("The model")["input_ids"][1:], padding])
    monkeypatch.setattr(stream, "pick", lambda logits, *_: torch.tensor([next(chosen)]))
    made = Continuation(model, tokenizer, "So", Settings(max_new_tokens=4))
    pieces = list(made)
    assert made.tokens[0] == padding
    assert "".join(pieces) == tokenizer.decode(made.tokens, skip_special_tokens=True)


def test_the_kernels_decoder_continues_as_the_exported_class_does(opened, monkeypatch):
    settings = Settings(mode="sparse", block_count=2, max_new_tokens=50)
    want = "".join(Continuation(*opened, "The model", settings))
    used = []

    def kernels(self):
        used.append(Decoder(self.model, 1, 200, mode=self.mode, block_count=settings.block_count))
        return used[0]

    monkeypatch.setattr(Continuation, "_make_decoder", kernels)
    assert "".join(Continuation(*opened, "The model", settings)) == want
    assert used[0].length > 50


def test_generation_ends_with_the_documents_end_mark(opened):
    model, tokenizer = opened
    first = Continuation(model, tokenizer, "The model", Settings(max_new_tokens=9))
    list(first)
    end = model.config.eos_token_id
    try:
        model.config.eos_token_id = first.tokens[4]
        again = Continuation(model, tokenizer, "The model", Settings(max_new_tokens=9))
        list(again)
    finally:
        model.config.eos_token_id = end
    assert again.tokens == first.tokens[: first.tokens.index(first.tokens[4])]


def test_sampling_is_repeatable_by_seed_and_draws_from_the_nucleus_only(opened):
    texts = [
        "".join(Continuation(*opened, "The", Settings(temperature=1.5, seed=seed, max_new_tokens=20)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    logits, generator = torch.tensor([[2.0, 1.0, 0.0, -1.0]]), torch.Generator().manual_seed(0)
    drawn = {stream.pick(logits, 1.0, 0.8, generator).item() for _ in range(200)}
    assert drawn == {0, 1}  # 64 % and 24 %: together the first that hold 80 %
    assert {stream.pick(logits, 1.0, 0.6, generator).item() for _ in range(50)} == {0}


def test_text_goes_to_standard_output_and_figures_to_standard_error(folder, opened, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("The model\n\nEvery\n"))
    stream.run(folder, (), Settings(mode="sparse", max_new_tokens=12))
    out, err = capsys.readouterr()
    want = bare.generate_texts(*opened, ["The model", "Every"], mode="sparse", max_new_tokens=12)
    assert out == "".join(text + "\n" for text in want)
    [first, _] = re.findall(r"^\[sparse.*", err, re.MULTILINE)  # transformers 5 shows its loading there
    found = re.fullmatch(
        r"\[sparse, 3 blocks: prompt (\d+) in \d+\.\d\d s, 12 new, \d+\.\d tokens/s, cache (\d+\.\d\d) MB\]", first
    )
    # keys, values fp32: 2 layers x 2 heads x 8 channels x 2 x 4 bytes a token, with room to grow, and pooled keys
    assert float(found[2]) >= (int(found[1]) + 11) * 256 / 1e6 - 0.005


def test_a_run_is_exported_on_the_way(run, folder, capsys):
    stream.run(run, ["The model"], Settings(max_new_tokens=5))
    first = capsys.readouterr()
    stream.run(folder, ["The model"], Settings(max_new_tokens=5))
    assert first.out == capsys.readouterr().out
    assert "is a run" in first.err


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_dialogue_changes_mode_and_budget_and_ends_with_an_empty_line(folder, capsys, monkeypatch):
    lines = "The model\n/mode sparse\n/blocks 2\nThe model\n/blocks none\n/mode both\n/what\n\nnot reached\n"
    monkeypatch.setattr("sys.stdin", Terminal(lines))
    stream.run(folder, (), Settings(max_new_tokens=3))
    out, err = capsys.readouterr()
    assert out.count("\n") >= 2
    figures = re.findall(r"\[(full|sparse, \d+ blocks): prompt", err)
    assert figures == ["full", "sparse, 2 blocks"]
    assert "block_count=0" in err
    assert "mode='both'" in err
    assert err.count(stream.HELP) == 2


def test_wrong_settings_and_targets_are_named(tmp_path, monkeypatch, folder):
    for values, id, mention in (
        ({"mode": "dense"}, "unknown-mode", "mode='dense'"),
        ({"top_p": 0.0}, "stream-sampling", "top_p=0"),
        ({"block_count": 0}, "block-count", "block_count=0"),
        ({"max_new_tokens": 0}, "stream-max-new-tokens", "max_new_tokens=0"),
    ):
        with raises(ConfigError, id, mention):
            Settings(**values)
    with raises(CheckpointError, "not-an-export", tmp_path):
        stream.run(tmp_path, ["x"], Settings())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    with raises(DataProblem, "prompt-not-utf8"):
        stream.run(folder, (), Settings())


def test_a_prompt_that_is_not_utf8_ends_in_one_line(folder):
    """In the C locale Python lets such bytes through as lone surrogates, which the tokenizer answered with a TypeError."""
    command = [sys.executable, "-W", "ignore", "-m", "ssa_megatron", "generate", str(folder)]
    plain = {
        key: value for key, value in os.environ.items() if not key.startswith(("LC_", "PYTHONUTF8", "PYTHONIOENC"))
    }
    for arguments, piped in (([], b"caf\xe9\n"), ([b"caf\xe9"], b"")):
        done = subprocess.run([*command, *arguments], input=piped, capture_output=True, env=plain | {"LANG": "C"})
        assert done.returncode == 3, done.stderr
        assert done.stdout == b""
        assert b"error[prompt-not-utf8]: " in done.stderr
        assert b"Traceback" not in done.stderr


def test_a_text_longer_than_training_is_said_to_be_and_nothing_else_is(folder, capsys, caplog):
    stream.run(folder, ["word " * 130], Settings(max_new_tokens=1))
    said = capsys.readouterr().err
    assert re.search(r"\[up to \d{3} tokens; the model was trained on 128\]", said)
    stream.run(folder, ["word"], Settings(max_new_tokens=1))
    assert "trained on" not in capsys.readouterr().err
    assert "indexing errors" not in said + caplog.text
