"""Which steps to measure for a step-time profile, within what an engine has room for."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

DECODE_STEPS = 4
"""Steps in which a batch only decodes, before prompts join it."""
REPEATS = 3
"""Steps with a prompt of each length."""
CHUNKS = (16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CONTEXTS = (64, 256, 1024, 4096, 16384)
LONG_PROMPT_STEPS = 4
"""Whole steps that a prompt takes which is to show what its own context costs."""
KV_SHARE = 0.85
"""Part of the KV cache that a batch may fill, so that nobody is preempted."""


class Room(NamedTuple):
    """What an engine takes at once: requests, tokens a step, tokens a request, tokens in the KV cache."""

    requests: int
    step_tokens: int
    request_tokens: int
    kv_tokens: int


class Batch(NamedTuple):
    """So many requests decode, each after ``context`` tokens, and may generate ``output_tokens`` meanwhile;
    then prompts of these lengths join them one by one.
    """

    decodes: int
    context: int
    chunks: tuple[int, ...]
    output_tokens: int = 0

    def __str__(self) -> str:
        decodes = f"{self.decodes} decodes after {self.context:,} tokens" if self.decodes else "prompts alone"
        return f"{decodes}, prompts of {len(self.chunks)} lengths"


def batches(room: Room, seed: int = 0) -> list[Batch]:
    """All batches that there is room for: prompts alone first, the others in random order, so that a plan
    that is cut short has measured some of everything.
    """
    longest = min(room.request_tokens - 1, int(KV_SHARE * room.kv_tokens))
    alone = _chunks(room.step_tokens, longest)
    long_prompt = min(longest, LONG_PROMPT_STEPS * room.step_tokens)
    if long_prompt > room.step_tokens:
        alone = (*alone, long_prompt)
    decoding = list(_decoding(room, longest))
    random.Random(seed).shuffle(decoding)
    return [Batch(0, 0, alone), *decoding]


def _decoding(room: Room, longest: int) -> Iterator[Batch]:
    for decodes in _decode_counts(room.requests):
        beside = room.step_tokens - decodes
        chunks = _chunks(beside, longest) if decodes < room.requests else ()
        for context in CONTEXTS:
            # The first to decode goes on while the last one's prompt is computed, and through all that
            # follows; in an engine with overlap a prompt is computed a step after it came.
            fill = -(-decodes * context // max(1, beside)) + 1
            output = fill + DECODE_STEPS + 2 * REPEATS * len(chunks) + 8
            left = int(KV_SHARE * room.kv_tokens) - decodes * (context + output)
            if context + output > room.request_tokens or left < 0:
                break
            yield Batch(decodes, context, tuple(chunk for chunk in chunks if chunk <= left), output)


def _decode_counts(requests: int) -> list[int]:
    """1, 4, 16 and so on, and as many as leave a seat for a prompt."""
    most = max(1, requests - 1)
    counts = {most}
    count = 1
    while count < most:
        counts.add(count)
        count *= 4
    return sorted(counts)


def _chunks(step_tokens: int, longest: int) -> tuple[int, ...]:
    """Lengths of prompts that are computed in one step, the largest such one among them."""
    most = min(step_tokens, longest)
    return tuple(sorted({chunk for chunk in CHUNKS if chunk < most} | ({most} if most > 0 else set())))
