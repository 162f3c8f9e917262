"""Needle in a haystack: one fact at a chosen depth of a long text, then the beginning of the same sentence; is it known?

Retrieved by ranking: the fact's word has a higher log-likelihood than every other candidate. Every haystack is asked once
with each candidate as the fact's word, so a model that cannot see the fact scores exactly 1 / candidates and a margin of
0, whatever words it likes. Retrieved by greedy generation: the most likely next tokens are the word's tokens, one after
the other. It refuses haystacks shorter than the context.
"""

import math
import random
from dataclasses import dataclass

import torch

from ssa_megatron.errors import ConfigError, DataProblem
from ssa_megatron.evaluation.measure_settings import Settings
from ssa_megatron.evaluation.targets import Opened, not_finite
from ssa_megatron.evaluation.text import Text, encode

NAMES = "Abraham Caleb Daniel Esther Gideon Hannah Isaac Jacob Miriam Nathan Naomi Peter Rachel Samuel Sarah Simon"
WORDS = (
    "apple bread candle camel cloud copper corn crown eagle field fire flower garden gate gold grass hammer harp honey "
    "horse house iron lamp lion mountain oil olive pearl river rock salt sheep ship silver star stone sword tree water "
    "wine"
)
FACT = "The secret word of {name} is"


@dataclass(frozen=True)
class Sample:
    """Token ids. `prompt`: bos, haystack with the fact in it, question; `candidates`: the answer first."""

    prompt: list[int]
    candidates: list[list[int]]


def needle(opened: Opened, haystack: Text, settings: Settings) -> dict:
    """`cells`: for each mode, context and depth the shares of needles retrieved (`ranked`, `greedy`), the mean rank of the
    answer (1 is best) and its mean `margin`, nats above the mean of the other candidates."""
    tokens = stream(opened.tokenizer, haystack)
    cells = []
    for mode in ("full", "sparse"):
        for context in settings.lengths:
            samples = [
                sample
                for depth in settings.depths
                for number in range(settings.haystacks)
                for sample in build(
                    opened.tokenizer, tokens, context, depth, f"{settings.seed} {number}", settings.candidates
                )
            ]
            found = [
                answer
                for batch in _batches(samples, settings.batch_tokens)
                for answer in _ask(opened.model, batch, mode)
            ]
            if not all(math.isfinite(score) for scores, _ in found for score in scores):
                raise not_finite(opened, mode)
            count = len(samples) // len(settings.depths)
            for i, depth in enumerate(settings.depths):
                part = found[i * count : (i + 1) * count]
                cells.append({"mode": mode, "context": context, "depth": depth, **_summary(part)})
    return {
        "contexts": list(settings.lengths),
        "depths": list(settings.depths),
        "chance": 1 / settings.candidates,
        "block_count": opened.model.config.block_count,
        "haystack": haystack.fingerprint,
        "fact": FACT.format(name=NAMES.split()[0]) + f" {WORDS.split()[0]}.",
        "cells": cells,
    }


def stream(tokenizer, haystack: Text) -> list[int]:
    """All of the haystack's tokens, a newline after each document."""
    return [token for document in haystack.documents for token in encode(tokenizer, document + "\n")]


def build(tokenizer, hay: list[int], context: int, depth: float, seed: str, candidates: int) -> list[Sample]:
    """A prompt of exactly `context` tokens for each candidate: a stretch of `hay`, the fact at `depth` of it, the question.

    The stretch, the name and the words depend on `seed` alone, so all depths and contexts ask the same questions. From the
    fact on, the prompts of all candidates are equal, each token at its own position. Raises ConfigError, DataProblem.
    """
    draw = random.Random(seed)
    fact, words = FACT.format(name=draw.choice(NAMES.split())), draw.sample(WORDS.split(), candidates)
    answers = [encode(tokenizer, f" {word}") for word in words]
    planted = [encode(tokenizer, f"\n{fact} {word}.\n") for word in words]
    asked = encode(tokenizer, f"\n{fact}")
    marks = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    room = context - len(marks) - len(asked) - max(map(len, planted))
    if room < 1:
        raise ConfigError(
            f"--lengths: {context} tokens do not hold the needle",
            remedy=f"begin at {2 * (context - room)} or more",
            id="context-without-needle",
        )
    if len(hay) < context:
        raise DataProblem(
            f"the haystack has {len(hay):,} tokens, and a context {context:,}",
            remedy="give a longer one with --haystack, or shorter --lengths",
            id="haystack-too-short",
        )
    end = context + int(draw.random() * (len(hay) - context + 1))
    after = round((1 - depth) * room)
    prompts = []
    for fact_tokens in planted:
        before = context - len(marks) - len(fact_tokens) - after - len(asked)
        prompts.append(marks + hay[end - after - before : end - after] + fact_tokens + hay[end - after : end] + asked)
    return [Sample(prompt, [answers[i], *answers[:i], *answers[i + 1 :]]) for i, prompt in enumerate(prompts)]


@torch.inference_mode()
def _ask(model, batch: list[Sample], mode: str) -> list[tuple[list[float], bool]]:
    """For each sample the log-likelihood of every candidate, and whether greedy decoding writes the answer.

    Greedy decoding writes the answer if and only if, after each beginning of it, its next token is the most likely one; so
    the pass that scores the answer says it, and nothing is generated.
    """
    prompts = torch.tensor([sample.prompt for sample in batch], device=model.device)
    output = model(prompts, inference_mode=mode, use_cache=True, logits_to_keep=1)
    cache, first = output.past_key_values, output.logits[:, -1:].float()
    scores, greedy = [], []
    for i in range(len(batch[0].candidates)):
        chosen = [sample.candidates[i] for sample in batch]
        longest = max(map(len, chosen))
        padded = torch.tensor([c + [c[-1]] * (longest - len(c)) for c in chosen], device=model.device)
        logits = first
        if longest > 1:
            more = model(padded[:, :-1], inference_mode=mode, use_cache=True, past_key_values=cache).logits
            cache.crop(prompts.shape[1])
            logits = torch.cat((first, more.float()), 1)
        real = torch.arange(longest, device=model.device) < torch.tensor(
            [[len(c)] for c in chosen], device=model.device
        )
        nats = logits.log_softmax(-1).gather(2, padded[..., None])[..., 0]
        scores.append((nats * real).sum(1).tolist())
        if i == 0:
            greedy = ((logits.argmax(-1) == padded) | ~real).all(1).tolist()
    return list(zip(map(list, zip(*scores, strict=True)), greedy, strict=True))


def _summary(found: list[tuple[list[float], bool]]) -> dict:
    # of equal candidates the answer is the last: it must be better than all others to count
    ranks = [1 + sum(other >= scores[0] for other in scores[1:]) for scores, _ in found]
    margins = [scores[0] - math.fsum(scores[1:]) / (len(scores) - 1) for scores, _ in found]
    return {
        "samples": len(found),
        "ranked": sum(rank == 1 for rank in ranks) / len(found),
        "greedy": sum(greedy for _, greedy in found) / len(found),
        "mean_rank": sum(ranks) / len(found),
        "margin": math.fsum(margins) / len(found),
    }


def _batches(samples: list[Sample], batch_tokens: int):
    rows = max(1, batch_tokens // len(samples[0].prompt))
    return (samples[at : at + rows] for at in range(0, len(samples), rows))
