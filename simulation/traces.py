"""Requests with lengths and prefix reuse: reader of Mooncake traces, and a seeded generator of their shape.

Both give a prompt as the identities of its 512-token chunks, as the Mooncake FAST'25 release does: equal
leading identities mean an equal prefix.
"""

from __future__ import annotations

import gzip
import json
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, cycle, islice
from pathlib import Path

CHUNK_TOKENS = 512
"""Tokens that one identity of a trace stands for."""

HISTORY = 4096
"""Requests back to which a generated one may continue."""


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: ``chunks[i]`` identifies tokens ``512 * i`` to ``512 * (i + 1)`` and all before them."""

    input_tokens: int
    output_tokens: int
    chunks: tuple[int, ...]


def read_mooncake(path: Path) -> list[TraceRequest]:
    """Read a Mooncake trace (JSON lines, gzipped or not).

    Raises:
        ValueError: a line is not a request, with the line's number.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    requests = []
    with opener(path, "rt") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                request = TraceRequest(row["input_length"], row["output_length"], tuple(row["hash_ids"]))
            except (KeyError, TypeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path}, line {number}: not a Mooncake request ({error!r})") from error
            requests.append(request)
    return requests


@dataclass(frozen=True, slots=True, kw_only=True)
class MooncakeShape:
    """Distribution of requests, fitted to the Mooncake conversation trace.

    Input lengths are lognormal (median 6,909, P90 27,400 tokens), outputs lie around 350 tokens; 39 % of
    the requests continue an earlier one, 423 requests back in the median (P10 141, P90 1,662).
    """

    input_median: float = 6909.0
    input_sigma: float = 1.053
    longest_input: int = 126_195
    output_mean: float = 342.0
    continued: float = 0.39
    gap_median: float = 423.0
    gap_sigma: float = 0.95
    turn_median: float = 1400.0
    turn_sigma: float = 1.2


def generate_mooncake(seed: int, shape: MooncakeShape | None = None) -> Iterator[TraceRequest]:
    """An endless stream of requests of ``shape``; the same seed gives the same stream.

    The stream begins in the middle: requests that came before it can be continued like any other.
    """
    shape = shape or MooncakeShape()
    rng = random.Random(seed)
    history: deque[TraceRequest] = deque(maxlen=HISTORY)
    next_chunk = 1
    for number in count():
        request = _next_request(rng, shape, history, next_chunk)
        next_chunk += len(request.chunks)
        history.append(request)
        if number >= HISTORY:
            yield request


def _next_request(
    rng: random.Random, shape: MooncakeShape, history: deque[TraceRequest], next_chunk: int
) -> TraceRequest:
    gap = int(rng.lognormvariate(math.log(shape.gap_median), shape.gap_sigma)) + 1
    prefix: tuple[int, ...] = (0,)
    if rng.random() < shape.continued and gap <= len(history):
        earlier = history[-gap]
        prefix = earlier.chunks[: earlier.input_tokens // CHUNK_TOKENS] or prefix
        turn = int(rng.lognormvariate(math.log(shape.turn_median), shape.turn_sigma)) + 1
        tokens = len(prefix) * CHUNK_TOKENS + turn
    else:
        tokens = int(rng.lognormvariate(math.log(shape.input_median), shape.input_sigma)) + 1
    tokens = min(tokens, shape.longest_input)
    chunks = -(-tokens // CHUNK_TOKENS)
    own = range(next_chunk, next_chunk + max(chunks - len(prefix), 0))
    output = max(1, int(rng.gauss(shape.output_mean, shape.output_mean * 0.6)))
    return TraceRequest(tokens, output, (prefix + tuple(own))[:chunks])


def replay(trace: Sequence[TraceRequest] | None, seed: int) -> Iterator[TraceRequest]:
    """The trace over and over, from a place that depends on the seed; without one, generated requests."""
    if trace is None:
        return generate_mooncake(seed)
    return islice(cycle(trace), seed * len(trace) // 5 % len(trace), None)
