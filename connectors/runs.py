"""Runs: maximal stretches of consecutive block ids, and how two sides' runs join.

A request's KV cache is a list of block ids in token order. A *run* is a stretch of that list whose ids
ascend by one; with a block-outermost layout a run is one contiguous byte range. A transfer can move as one
descriptor only what is a run on both sides at the same positions: a *joint run* (FlowKV, section 3.2:
bidirectional segment alignment).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Run(NamedTuple):
    """``length`` consecutive block ids, the first of which is ``start``."""

    start: int
    length: int

    @property
    def stop(self) -> int:
        """One past the last block id."""
        return self.start + self.length


class JointRun(NamedTuple):
    """``length`` blocks, consecutive at the source from ``source`` and at the target from ``target``."""

    source: int
    target: int
    length: int


def runs_of(block_ids: Iterable[int]) -> list[Run]:
    """Group block ids, in token order, into ascending runs. O(blocks)."""
    runs: list[Run] = []
    start = previous = -2
    for block_id in block_ids:
        if block_id != previous + 1:
            if previous >= 0:
                runs.append(Run(start, previous - start + 1))
            start = block_id
        previous = block_id
    if previous >= 0:
        runs.append(Run(start, previous - start + 1))
    return runs


def blocks_of(runs: Iterable[Run]) -> Iterator[int]:
    """The block ids of ``runs``, in order."""
    for run in runs:
        yield from range(run.start, run.stop)


def count_blocks(runs: Iterable[Run]) -> int:
    """Number of blocks that ``runs`` cover."""
    return sum(run.length for run in runs)


def slice_runs(runs: Iterable[Run], first: int, count: int) -> list[Run]:
    """The runs that cover positions ``first`` to ``first + count`` of the block list. O(runs).

    Raises:
        ValueError: the runs hold fewer than ``first + count`` blocks.
    """
    out: list[Run] = []
    skip, want = first, count
    for run in runs:
        if want == 0:
            break
        if skip >= run.length:
            skip -= run.length
            continue
        taken = min(run.length - skip, want)
        out.append(Run(run.start + skip, taken))
        skip, want = 0, want - taken
    if want:
        raise ValueError(f"runs end {want} blocks before position {first + count}")
    return out


def join_runs(source: Sequence[Run], target: Sequence[Run]) -> list[JointRun]:
    """Merge two run lists that describe the same blocks into joint runs. O(runs), not O(blocks).

    Raises:
        ValueError: the two sides cover different numbers of blocks.
    """
    if count_blocks(source) != count_blocks(target):
        raise ValueError(f"source has {count_blocks(source)} blocks, target has {count_blocks(target)}")
    joint: list[JointRun] = []
    sources, targets = iter(source), iter(target)
    s = t = Run(0, 0)
    while True:
        if not s.length and (s := next(sources, Run(-1, 0))).start < 0:
            return joint
        if not t.length:
            t = next(targets)
        length = min(s.length, t.length)
        joint.append(JointRun(s.start, t.start, length))
        s = Run(s.start + length, s.length - length)
        t = Run(t.start + length, t.length - length)
