"""Retrieval prompts in the manner of RULER, as token ids of a vocabulary that says what every token is for.

A context is filler with records in it. ``KEY c d a b`` says that ``c d`` is the value of key ``a b``; ``LET
a b c d`` assigns a value to a variable, ``LET a b a' b'`` assigns it another variable. ``ASK a b`` wants
the value, ``LIST a b a' b' ... ANSWER`` all keys with their values, ``TRACE c d`` all variables that come
to have that value. The letters stand for four alphabets: keys, variables and values take two tokens each,
and no single token tells one from all others.

Tasks are those of RULER (Hsieh et al. 2024): a single needle, four needles of which one is asked for
(``multikey``) or all are (``multiquery``), a needle every 64 tokens of which one is asked for (``crowded``,
in place of RULER's haystacks of needles), and variable tracking, here among chains that are not asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Literal, get_args

import msgspec

Task = Literal["single", "multikey", "multiquery", "crowded", "tracking"]
TASKS: tuple[Task, ...] = get_args(Task)

SPECIAL_WORDS = ("<s>", "</s>", "<pad>", "KEY", "ASK", "LIST", "ANSWER", "LET", "TRACE")
BOS, EOS, PAD, KEY, ASK, LIST, ANSWER, LET, TRACE = range(len(SPECIAL_WORDS))
FILLERS = 119
LETTERS = 64
"""Size of each of the four alphabets: 4096 keys and as many values."""
FILLER = range(len(SPECIAL_WORDS), len(SPECIAL_WORDS) + FILLERS)
A, B, C, D = (range(start, start + LETTERS) for start in (FILLER.stop + n * LETTERS for n in range(4)))
VOCABULARY = D.stop

SPACING = 64
"""Tokens of a context for each needle of ``crowded``."""
QUERIES = 4
"""Needles of ``multikey`` and ``multiquery``, as in RULER."""
HOPS = 4
"""A chain of variables has one more name than hops, as in RULER."""
OTHER_CHAINS = 3

Pair = tuple[int, int]


class Prompt(msgspec.Struct, frozen=True):
    """One question with its context."""

    task: Task
    tokens: tuple[int, ...]
    answer: tuple[int, ...]
    """What greedy decoding should give, ``len(answer)`` tokens."""
    references: tuple[Pair, ...]
    """Pairs that must stand in the output."""

    def score(self, output: Sequence[int]) -> float:
        """Share of the references that the output holds: RULER's ``string_match_all``."""
        found = set(pairwise(output))
        return sum(pair in found for pair in self.references) / len(self.references)


def words() -> list[str]:
    """The word of each token id."""
    alphabets = [f"{name}{n}" for name in "abcd" for n in range(LETTERS)]
    return [*SPECIAL_WORDS, *(f"w{n}" for n in range(FILLERS)), *alphabets]


def make_prompts(task: Task, length: int, seed: int, questions: int = 1) -> list[Prompt]:
    """Prompts of exactly ``length`` tokens that share one context and ask for different things.

    A prefix cache computes the context once. Answers come on top of ``length``. Equal arguments give equal
    prompts, and more questions only add to fewer.

    Raises:
        ValueError: the task does not fit into ``length``, or its context has no answers to so many questions.
    """
    rng = random.Random(f"{task} {length} {seed}")
    return _tracking(length, rng, questions) if task == "tracking" else _needles(task, length, rng, questions)


def most_questions(task: Task, length: int) -> int:
    """How many questions one context of a task can answer."""
    return 1 + OTHER_CHAINS if task == "tracking" else _needle_count(task, length)


def shared_tokens(prompts: Sequence[Prompt]) -> int:
    """Length of the longest common beginning, at least one token short of the shortest prompt."""
    count = 0
    for column in zip(*(prompt.tokens[:-1] for prompt in prompts), strict=False):
        if len(set(column)) > 1:
            break
        count += 1
    return count


def make_prompt(task: Task, length: int, seed: int) -> Prompt:
    """The first of ``make_prompts``."""
    return make_prompts(task, length, seed)[0]


def distinct_pairs(rng: random.Random, first: Sequence[int], second: Sequence[int], count: int) -> list[Pair]:
    """``count`` pairs of one token of each alphabet, no pair twice; single tokens may come again."""
    codes = rng.sample(range(len(first) * len(second)), count)
    return [(first[code // len(second)], second[code % len(second)]) for code in codes]


def chain_records(names: Sequence[Pair], value: Pair) -> list[tuple[int, ...]]:
    """The ``LET`` records of a chain, in order: the first name gets the value, each other the name before."""
    return [(LET, *name, *source) for name, source in zip(names, [value, *names], strict=False)]


def interleave(rng: random.Random, chains: Sequence[Sequence[tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """All records in one random order that keeps the order inside each chain."""
    order = [number for number, chain in enumerate(chains) for _ in chain]
    rng.shuffle(order)
    left = [iter(chain) for chain in chains]
    return [next(left[number]) for number in order]


def _lay_out(
    rng: random.Random, length: int, records: Sequence[tuple[int, ...]], question_tokens: int
) -> tuple[int, ...]:
    """A context of filler with the records at random places, in the order given; a question fills it up."""
    room = length - 1 - question_tokens - sum(map(len, records))
    if room < 0:
        raise ValueError(f"{len(records)} records and a question do not fit into {length} tokens")
    cuts = sorted(rng.randrange(room + 1) for _ in records)
    tokens = [BOS]
    at = 0
    for cut, record in zip(cuts, records, strict=True):
        tokens += rng.choices(FILLER, k=cut - at)
        tokens += record
        at = cut
    return (*tokens, *rng.choices(FILLER, k=room - at))


def _needle_count(task: Task, length: int) -> int:
    return {"single": 1, "crowded": max(1, length // SPACING)}.get(task, QUERIES)


def _needles(task: Task, length: int, rng: random.Random, questions: int) -> list[Prompt]:
    needles = _needle_count(task, length)
    _check_questions(task, length, questions)
    keys = distinct_pairs(rng, A, B, needles)
    values = distinct_pairs(rng, C, D, needles)
    records = [(KEY, *value, *key) for key, value in zip(keys, values, strict=True)]
    several = task == "multiquery"
    context = _lay_out(rng, length, records, 2 + 2 * QUERIES if several else 3)
    order = rng.sample(range(needles), needles)
    prompts = []
    for number in range(questions):
        chosen = [order[(number + n) % needles] for n in range(QUERIES if several else 1)]
        found = [(*keys[n], *values[n]) for n in chosen]
        references = tuple(values[n] for n in chosen)
        if several:
            question = (LIST, *chain(*(keys[n] for n in chosen)), ANSWER)
            prompts.append(Prompt(task, context + question, tuple(chain(*found)), references))
        else:
            prompts.append(Prompt(task, (*context, ASK, *keys[chosen[0]]), references[0], references))
    return prompts


def _tracking(length: int, rng: random.Random, questions: int) -> list[Prompt]:
    _check_questions("tracking", length, questions)
    chains = most_questions("tracking", length)
    names = distinct_pairs(rng, A, B, chains * (HOPS + 1))
    values = distinct_pairs(rng, C, D, chains)
    parts = [tuple(names[n::chains]) for n in range(chains)]
    records = interleave(rng, [chain_records(part, value) for part, value in zip(parts, values, strict=True)])
    context = _lay_out(rng, length, records, 3)
    return [
        Prompt("tracking", (*context, TRACE, *values[n]), tuple(chain(*parts[n])), parts[n])
        for n in range(questions)
    ]


def _check_questions(task: Task, length: int, questions: int) -> None:
    most = most_questions(task, length)
    if not 1 <= questions <= most:
        raise ValueError(f"{task} at {length} tokens answers 1 to {most} questions, not {questions}")
