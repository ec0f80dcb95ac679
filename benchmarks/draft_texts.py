"""Texts whose outputs repeat something, or nothing, for drafters that look up what was said before."""

from __future__ import annotations

import random
from collections.abc import Iterator

from penstock.benchmarks.tiny_model import corpus

Text = tuple[list[int], list[int]]
"""A prompt and the output that follows it."""
KINDS = ("quoting", "alike", "looping", "random")


def texts(kind: str, number: int, seed: int = 0) -> Iterator[Text]:
    """Prompts and outputs as token ids, words as tokens.

    ``quoting`` outputs repeat parts of their prompt with changes, ``alike`` outputs are variants of one text
    that no prompt shows, ``looping`` ones repeat a phrase, ``random`` ones nothing.
    """
    rng = random.Random(f"{kind} {seed}")
    words = corpus().split()
    ids = {word: index for index, word in enumerate(dict.fromkeys(words))}
    said = [ids[word] for word in words]
    shared = _passage(said, rng, 200)
    for _ in range(number):
        prompt = _passage(said, rng, 400)
        if kind == "quoting":
            start = rng.randrange(200)
            yield prompt, _edited(prompt[start : start + 200], rng)
        elif kind == "alike":
            yield [rng.randrange(len(ids)) for _ in range(50)], _edited(shared, rng)
        elif kind == "looping":
            yield prompt, (_passage(said, rng, rng.randint(3, 20)) * 70)[:200]
        else:
            yield prompt, [rng.randrange(len(ids)) for _ in range(200)]


def _passage(said: list[int], rng: random.Random, length: int) -> list[int]:
    start = rng.randrange(len(said) - length)
    return said[start : start + length]


def _edited(text: list[int], rng: random.Random) -> list[int]:
    return [token if rng.random() > 0.05 else rng.choice(text) for token in text]
