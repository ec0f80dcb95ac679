"""What a decode step computes where prefixes are shared: parts, for whom, and on which thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.kernels.shared_prefix.runs import Counts, Run, Tables

MOST_ROWS = 256
"""Of one part: query heads of a KV head, of all its requests. More of them leave the caches."""
FIXED_ROWS = 4
"""What a page costs whoever reads it, in rows that read it."""
SPLITS = 4
"""Parts are at most this fraction of what a thread has to do."""


class Item(NamedTuple):
    """A part: pages from ``first`` to before ``last`` of the table of request ``row``, of the last one
    ``tail`` tokens; members from ``begin`` to before ``end`` are the requests that read them."""

    row: int
    first: int
    last: int
    tail: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Layout:
    """A step, the same for all layers.

    ``table`` [B, P]; ``items`` [I, 6] as ``Item``; ``members`` [M], requests, of which each gets a part of
    its own, number ``m``. Request ``b`` has the parts ``slots[starts[b]:starts[b + 1]]``. ``work`` has, for
    each thread, int64 [W, 2], numbers of an item and of a KV head.
    """

    table: Tables
    items: Counts
    members: Counts
    starts: Counts
    slots: Counts
    work: Sequence[Counts]

    @property
    def requests(self) -> int:
        """How many."""
        return len(self.starts) - 1


def lay_out(
    tables: Tables,
    tokens: Counts,
    runs: Sequence[Run],
    *,
    block_tokens: int,
    heads: int,
    group: int,
    threads: int = 1,
) -> Layout:
    """The step in which each request of ``tables`` [B, P] has ``tokens`` [B], the shared ``runs`` once.

    ``heads`` are KV heads of ``group`` query heads each.
    """
    most = max(1, MOST_ROWS // group)
    parts = list(_shared(runs, most, block_tokens))
    parts += _own(tokens, runs, block_tokens)
    if threads > 1:
        parts = _split(parts, heads, group, threads, block_tokens)
    items: list[Item] = []
    members: list[int] = []
    for requests, (first, last, tail) in parts:
        items.append(Item(requests[0], first, last, tail, len(members), len(members) + len(requests)))
        members += requests
    who = np.array(members, np.int64)
    counts = np.bincount(who, minlength=len(tables))
    table = np.ascontiguousarray(tables, np.int32)
    every = np.array(items, np.int64).reshape(-1, 6)
    return Layout(
        table=table,
        items=every,
        members=who,
        starts=np.concatenate(([0], counts.cumsum())),
        slots=np.argsort(who, kind="stable"),
        work=_share(_costs(every, group, block_tokens), heads, threads),
    )


Pages = tuple[int, int, int]
"""The first, the one behind the last, and the tokens in the last."""
Part = tuple[Sequence[int], Pages]


def _shared(runs: Sequence[Run], most: int, block_tokens: int) -> Iterator[Part]:
    for run in runs:
        for begin in range(0, len(run.requests), most):
            yield run.requests[begin : begin + most], (run.first, run.last, block_tokens)


def _own(tokens: Counts, runs: Sequence[Run], block_tokens: int) -> Iterator[Part]:
    """What each request reads alone, behind its last run; nothing where it ends with it."""
    begins = [0] * len(tokens)
    for run in runs:
        for request in run.requests:
            begins[request] = max(begins[request], run.last)
    for request, (first, held) in enumerate(zip(begins, tokens.tolist(), strict=True)):
        last = -(-held // block_tokens)
        if last > first or first == 0:
            yield (request,), (first, last, held - (last - 1) * block_tokens)


def _split(parts: Sequence[Part], heads: int, group: int, threads: int, block_tokens: int) -> list[Part]:
    """Parts cut where one of a KV head would keep a thread busy for long."""

    def page_cost(requests: Sequence[int]) -> int:
        return FIXED_ROWS + len(requests) * group

    total = heads * sum(page_cost(requests) * (last - first) for requests, (first, last, _) in parts)
    limit = total / (threads * SPLITS)
    found: list[Part] = []
    for requests, (first, last, tail) in parts:
        pages = max(1, int(limit / page_cost(requests)))
        for begin in range(first, last, pages):
            end = min(begin + pages, last)
            found.append((requests, (begin, end, tail if end == last else block_tokens)))
        if first == last:
            found.append((requests, (first, last, tail)))
    return found


def _costs(items: Counts, group: int, block_tokens: int) -> npt.NDArray[np.float64]:
    pages = items[:, 2] - items[:, 1]
    held = pages * block_tokens - np.where(pages > 0, block_tokens - items[:, 3], 0)
    return (FIXED_ROWS + (items[:, 5] - items[:, 4]) * group) * held.astype(np.float64)


def _share(costs: npt.NDArray[np.float64], heads: int, threads: int) -> list[Counts]:
    """Neighbouring work for each thread, about as much for one as for another."""
    work = np.stack(np.meshgrid(np.arange(len(costs)), np.arange(heads), indexing="ij"), -1).reshape(-1, 2)
    before = np.repeat(costs, heads).cumsum()
    bounds = np.searchsorted(before, before[-1] * np.arange(1, threads) / threads) if len(before) else []
    return [np.ascontiguousarray(part) for part in np.split(work, bounds)]
