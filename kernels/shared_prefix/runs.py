"""Which blocks several requests of a batch share: a tree of prefixes over block tables."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Tables = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks from place ``first`` to before ``last`` of the tables of ``requests`` (numbers in the batch,
    ascending), the same in all of them."""

    requests: tuple[int, ...]
    first: int
    last: int

    @property
    def saved(self) -> int:
        """Blocks that need not be read again."""
        return (len(self.requests) - 1) * (self.last - self.first)


def shared_runs(tables: Tables, full: Counts, *, least_blocks: int = 1, least_requests: int = 2) -> list[Run]:
    """The runs that several requests share; one within another begins where that one ends.

    ``tables`` [B, P] have the blocks of each request from the left, of which the first ``full`` [B] are full.
    Prefixes may lie within prefixes, as a prompt for several answers does behind a system prompt for all: a
    block is read once for all that have it behind the same blocks. ``least_requests`` that share at least
    ``least_blocks`` beyond the run before are a run; fewer blocks are left to the runs, or the ends, of those
    that go on. With both at their least, no split reads fewer blocks.

    Time is that of sorting the tables, and at most quadratic in the number of requests.
    """
    width = int(full.max(initial=0))
    known = np.where(np.arange(width) < full[:, None], tables[:, :width], -1).astype(np.int32)
    # As bytes, rows are compared at once; any order will do in which equal beginnings are neighbours.
    order = np.array(sorted(range(len(known)), key=[row.tobytes() for row in known].__getitem__), np.int64)
    shared = _shared(known[order], full[order])
    return list(_runs(order, shared, least_blocks, least_requests))


def _shared(known: Tables, full: Counts) -> Counts:
    """How many blocks each row begins with that the next one does, too."""
    if len(known) < 2:
        return np.zeros(0, np.int64)
    differs = np.pad(known[1:] != known[:-1], ((0, 0), (0, 1)), constant_values=True)
    return np.minimum(differs.argmax(1), np.minimum(full[1:], full[:-1]))


def _runs(order: Counts, shared: Counts, least_blocks: int, least_requests: int) -> Iterator[Run]:
    # Neighbours from low to before high, whose blocks before covered are in runs.
    waiting = [(0, len(order), 0)]
    while waiting:
        low, high, covered = waiting.pop()
        if high - low < max(2, least_requests):
            continue
        between = shared[low : high - 1]
        depth = int(between.min())
        if depth - covered >= least_blocks:
            yield Run(tuple(sorted(order[low:high].tolist())), covered, depth)
            covered = depth
        cuts = (np.flatnonzero(between == depth) + low + 1).tolist()
        waiting += [(first, last, covered) for first, last in zip([low, *cuts], [*cuts, high], strict=True)]


class RunKeeper:
    """The runs of a batch, kept from step to step for as long as its tables only grow."""

    def __init__(self, *, least_blocks: int, least_requests: int) -> None:
        self._least = {"least_blocks": least_blocks, "least_requests": least_requests}
        self._tables = np.zeros((0, 0), np.int32)
        self._full = np.zeros(0, np.int64)
        self._within = np.zeros((0, 0), np.bool_)
        self._runs: list[Run] = []
        self.searches = 0
        """How often runs were looked for."""

    def runs(self, tables: Tables, full: Counts) -> list[Run]:
        """``shared_runs``. A request that has more blocks than before seldom shares them: blocks come to be
        shared by requests that come."""
        still = self._still(tables, full)
        grown = np.flatnonzero(full > self._full) if still else None
        if grown is None or self._joined(tables, full, grown):
            self.searches += 1
            self._runs = shared_runs(tables, full, **self._least)
        if grown is None or len(grown):
            self._keep(tables, full)
        return self._runs

    def _keep(self, tables: Tables, full: Counts) -> None:
        width = int(full.max(initial=0))
        self._tables, self._full = tables[:, :width].copy(), full.copy()
        self._within = np.arange(width) < full[:, None]

    def _still(self, tables: Tables, full: Counts) -> bool:
        if len(full) != len(self._full) or (full < self._full).any():
            return False
        width = self._tables.shape[1]
        return not ((tables[:, :width] != self._tables) & self._within).any()

    def _joined(self, tables: Tables, full: Counts, grown: Counts) -> bool:
        """Whether a block that was added is another request's too: one that has more of a prefix in the cache
        may take the row of one that ended. Who shares any added block shares the first."""
        first = self._full[grown]
        alike = (tables[:, first] == tables[grown, first]) & (full[:, None] > first)
        return bool(alike.sum() > len(grown))
