"""Two servers decode the same requests in turn: tokens a second, CPU time a token, how sure a ratio is."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from math import comb
from pathlib import Path
from typing import Self

import msgspec

from penstock.benchmarks.asks import Ask, AskError, ask_all, ask_together
from penstock.benchmarks.processes import Server

CHUNK = 4096
"""Tokens by which a context grows in the prefix cache: no request waits for longer than a client does."""
TURN_S = 0.1
"""A few tokens of each server."""
SURE = 0.95
"""Confidence of an interval, at least, where there are samples enough for it."""


class Decoded(msgspec.Struct, frozen=True):
    """One request whose context was cached, or its samples together."""

    tokens_s: float
    """By the time in which the server had its turn."""
    cpu_ms: float
    """CPU time a token of the engine's processes."""


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


def decode_in_turns(
    servers: Sequence[Server], model: str, prompt: Sequence[int], tokens: int, samples: int = 1
) -> list[Decoded]:
    """Have each server decode ``tokens`` after a prompt of which all whole blocks are cached, ``samples``
    times at once.

    Servers take turns of ``TURN_S`` and stand still out of turn, so that whatever else the machine does falls
    on all alike, however fast it changes.

    Raises:
        AskError: a server failed, or the model stopped before.
    """
    ask = Ask(name=f"{len(prompt):,} tokens", prompt=list(prompt), max_tokens=tokens)
    cpu = [engine_cpu_s(server.pid) for server in servers]
    had = [0.0] * len(servers)
    with ThreadPoolExecutor(len(servers)) as pool, contextlib.ExitStack() as stack:
        for server in servers:
            stack.callback(server.resume)
            server.pause()
        answers = [
            pool.submit(ask_together, server.url, model, [ask] * samples, at_once=samples)
            for server in servers
        ]
        while not all(answer.done() for answer in answers):
            for number, (server, answer) in enumerate(zip(servers, answers, strict=True)):
                if not answer.done():
                    began = time.perf_counter()
                    server.resume()
                    wait([answer], TURN_S)
                    server.pause()
                    had[number] += time.perf_counter() - began
        for server, answer in zip(servers, answers, strict=True):
            for one in answer.result():
                if len(one.token_ids) != tokens:
                    raise AskError(f"{server.url}: {ask.name}: {len(one.token_ids)} tokens came of {tokens}")
    cpu = [engine_cpu_s(server.pid) - before for server, before in zip(servers, cpu, strict=True)]
    every = samples * tokens
    return [Decoded(every / s, 1e3 * used / every) for s, used in zip(had, cpu, strict=True)]


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
