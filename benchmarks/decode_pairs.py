"""Two servers decode the same requests in turn: tokens a second, CPU time a token, how sure a ratio is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import comb
from pathlib import Path
from typing import Self

import msgspec

from penstock.benchmarks.asks import Ask, AskError, ask_all
from penstock.benchmarks.processes import Server

CHUNK = 4096
"""Tokens by which a context grows in the prefix cache: no request waits for longer than a client does."""
SURE = 0.95
"""Confidence of an interval, at least, where there are samples enough for it."""


class Decoded(msgspec.Struct, frozen=True):
    """One request whose context was cached: its rate after the first token, and what all of it cost."""

    tokens_s: float
    cpu_ms: float
    """CPU time a token of the engine's processes, the first token included."""


class Between(msgspec.Struct, frozen=True):
    """The median of a sample with an interval in which that of the population lies."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """From the order of ``values`` alone: the binomial bounds of a median. With fewer than six, which are
        too few for ``SURE``, the interval is their range."""
        ordered = sorted(values)
        count = len(ordered)
        # The k-th smallest and largest value leave out 2 P(Bin(n, 1/2) < k).
        outside, rank = 1, 1
        while rank < (count + 1) // 2 and 2 * (outside + comb(count, rank)) <= (1 - SURE) * 2**count:
            outside += comb(count, rank)
            rank += 1
        return cls(ordered[rank - 1], statistics.median(ordered), ordered[-rank])


def cache_context(server: Server, model: str, context: Sequence[int], begin: int = 0) -> None:
    """Bring ``context`` into the prefix cache, of which ``begin`` tokens are there."""
    ends = [*range(begin + CHUNK, len(context), CHUNK), len(context)]
    asks = [Ask(name=f"context to {end:,}", prompt=list(context[:end]), max_tokens=1) for end in ends]
    ask_all(server.url, model, asks)


def decode(server: Server, model: str, prompt: Sequence[int], tokens: int) -> Decoded:
    """Decode ``tokens`` after a prompt of which all whole blocks are cached.

    Raises:
        AskError: the server failed, or the model stopped before.
    """
    cpu = engine_cpu_s(server.pid)
    ask = Ask(name=f"{len(prompt):,} tokens", prompt=list(prompt), stream=True, max_tokens=tokens)
    (answer,) = ask_all(server.url, model, [ask])
    cpu = engine_cpu_s(server.pid) - cpu
    if len(answer.token_ids) != tokens or answer.first_token_s is None:
        raise AskError(f"{server.url}: {ask.name}: {len(answer.token_ids)} tokens came of {tokens}")
    return Decoded((tokens - 1) / (answer.total_s - answer.first_token_s), 1e3 * cpu / tokens)


def engine_cpu_s(leader: int) -> float:
    """CPU seconds so far of all threads of a server's process group, but not of ``leader``, which talks to
    clients and makes text of tokens. Linux; threads that have ended are not counted."""
    found = 0
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != leader and _group(folder) == leader:
            found += sum(_nanoseconds(thread) for thread in (folder / "task").glob("*/schedstat"))
    return found / 1e9


def _group(folder: Path) -> int | None:
    try:
        # The name in brackets may hold anything; then state, parent and group.
        return int((folder / "stat").read_text().rpartition(")")[2].split()[2])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _nanoseconds(schedstat: Path) -> int:
    try:
        return int(schedstat.read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        return 0
