"""Training sequences: short ones with dozens of questions, made to look like long ones.

Three things keep a model that learnt on 128 tokens right at 16k. Positions jump between records, as though
filler had been left out (PoSE, Zhu et al. 2023, for whole chunks), so that every distance of the long
context is seen. The keys of ballast, a stretch of filler at the front, have log-weights: a key of
log-weight log(n) counts as n keys, so that the softmax is as diluted as in the long context. And the pairs
of a sequence share single tokens far more often than pairs drawn at random.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from penstock.benchmarks.needle.task import (
    ANSWER,
    ASK,
    BOS,
    FILLER,
    HOPS,
    KEY,
    LIST,
    PAD,
    QUERIES,
    TRACE,
    A,
    B,
    C,
    D,
    Pair,
    chain_records,
    distinct_pairs,
    interleave,
)

IGNORED = -100
"""Target of a token on which there is no loss; torch's default."""


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """What the sequences of one stage look like."""

    length: int
    """Tokens of a sequence."""
    span: int
    """Positions that the jumps may cover, at most. 0: positions are contiguous."""
    weight: float = 1.0
    """A ballast key counts as many keys, at most."""
    questions: float = 0.45
    """Share of the tokens that goes to questions and answers."""
    needles: float = 0.55
    """Share of the sequences with keys and values; the others have chains of variables."""
    filler: float = 0.25
    """Share of the context that is filler, at least."""


class Batch(msgspec.Struct, frozen=True):
    """Tensors [batch, T]."""

    tokens: Tensor
    targets: Tensor
    """The next token where it is part of an answer, else ``IGNORED``."""
    positions: Tensor
    log_weights: Tensor


class _Draft:
    """One sequence in the making."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.tokens: list[int] = [BOS]
        self.answers: list[bool] = [False]
        self.seams: list[int] = []
        self.ballast = (1, 1)

    def add(self, tokens: Sequence[int], answered: int = 0) -> None:
        """Tokens of which the last ``answered`` are an answer. A jump may come before them."""
        self.seams.append(len(self.tokens))
        self.tokens += tokens
        self.answers += [False] * (len(tokens) - answered) + [True] * answered

    def fill(self, count: int) -> None:
        self.add(self.rng.choices(FILLER, k=count))


def make_batch(lesson: Lesson, size: int, seed: int) -> Batch:
    """``size`` sequences. Equal arguments give equal batches."""
    rng = random.Random(seed)
    tokens = np.full((size, lesson.length), PAD, np.int64)
    targets = np.full((size, lesson.length), IGNORED, np.int64)
    positions = np.zeros((size, lesson.length), np.int64)
    log_weights = np.zeros((size, lesson.length), np.float32)
    for row in range(size):
        draft = _write(lesson, rng)
        count = min(lesson.length, len(draft.tokens))
        tokens[row, :count] = draft.tokens[:count]
        answered = np.array(draft.answers[1 : lesson.length])
        nexts = np.array(draft.tokens[1 : lesson.length])
        targets[row, : len(nexts)] = np.where(answered, nexts, IGNORED)
        positions[row] = _positions(draft, lesson)
        start, end = draft.ballast
        log_weights[row, start:end] = rng.random() * math.log(lesson.weight)
    return Batch(*(torch.from_numpy(array) for array in (tokens, targets, positions, log_weights)))


def _write(lesson: Lesson, rng: random.Random) -> _Draft:
    draft = _Draft(rng)
    context = int(lesson.length * (1 - lesson.questions))
    filler = int(context * (lesson.filler + (1 - lesson.filler) * 0.6 * rng.random() ** 2))
    ballast = filler // 2
    for start in range(0, ballast, 8):
        draft.fill(min(8, ballast - start))
    draft.ballast = (1, 1 + ballast)
    records = max(2, (context - filler) // 5)
    if rng.random() < lesson.needles:
        _needles(draft, records, filler - ballast, lesson.length)
    else:
        _chains(draft, records, filler - ballast, lesson.length)
    return draft


def _narrow_pairs(rng: random.Random, count: int) -> list[Pair]:
    """Distinct keys or names from parts of their alphabets that are often only just large enough for them."""
    least = math.isqrt(count - 1) + 1
    size = min(64, max(least, round(least * 2 ** (4 * rng.random()))))
    return distinct_pairs(rng, rng.sample(A, size), rng.sample(B, size), count)


def _scatter(draft: _Draft, records: Sequence[tuple[int, ...]], filler: int) -> None:
    """Records in order, with so many tokens of filler between them and after the last."""
    cuts = sorted(draft.rng.randrange(filler + 1) for _ in records)
    at = 0
    for cut, record in zip(cuts, records, strict=True):
        if cut > at:
            draft.fill(cut - at)
        draft.add(record)
        at = cut
    draft.fill(filler - at)


def _needles(draft: _Draft, count: int, filler: int, length: int) -> None:
    rng = draft.rng
    keys = _narrow_pairs(rng, count)
    values = distinct_pairs(rng, C, D, count)
    _scatter(draft, [(KEY, *value, *key) for key, value in zip(keys, values, strict=True)], filler)
    # One list a sequence at most: "the first key of the list" must mean one thing.
    lists_at = rng.random() * 1.6
    listed = count < QUERIES
    start = len(draft.tokens)
    while len(draft.tokens) < length:
        if not listed and len(draft.tokens) - start >= lists_at * (length - start):
            listed = True
            chosen = rng.sample(range(count), QUERIES)
            answer = [token for n in chosen for token in (*keys[n], *values[n])]
            draft.add([LIST, *(token for n in chosen for token in keys[n]), ANSWER, *answer], len(answer))
        else:
            n = rng.randrange(count)
            draft.add([ASK, *keys[n], *values[n]], 2)


def _chains(draft: _Draft, count: int, filler: int, length: int) -> None:
    rng = draft.rng
    names = _narrow_pairs(rng, count)
    chains: list[list[Pair]] = []
    at = 0
    while at < count:
        size = rng.randint(1, HOPS + 1)
        chains.append(names[at : at + size])
        at += size
    values = distinct_pairs(rng, C, D, len(chains))
    records = [chain_records(chain, value) for chain, value in zip(chains, values, strict=True)]
    _scatter(draft, interleave(rng, records), filler)
    while len(draft.tokens) < length:
        n = rng.randrange(len(chains))
        answer = [token for name in chains[n] for token in name]
        draft.add([TRACE, *values[n], *answer], len(answer))


def _positions(draft: _Draft, lesson: Lesson) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Contiguous positions with jumps at seams. A jump's length is as uneven as the gaps of real contexts."""
    steps = np.ones(lesson.length, np.int64)
    steps[0] = 0
    seams = [seam for seam in draft.seams if seam < lesson.length]
    total = round(lesson.span * draft.rng.random())
    if total and seams:
        shares = np.array([draft.rng.random() ** 4 for _ in seams])
        steps[seams] += (total * shares / shares.sum()).astype(np.int64)
    return np.cumsum(steps)
