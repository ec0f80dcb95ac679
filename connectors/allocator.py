"""Chooses which free blocks a request gets, so that they form few runs and cost few prefix-cache hits.

The engine keeps its own list of free blocks in eviction order; this allocator mirrors the set of them and
answers which to hand out. Every choice is a *window* of consecutive free blocks, bought at the price

    (1 run + weight * depth in the eviction order of what it evicts) / blocks gained

and a request takes the cheapest windows until it is served: one old window where there is one, several
where the pool is scarce. (FlowKV, section 3.2: segment allocator and bidirectional alignment; the price
replaces the paper's plain best fit, which evicts what the prefix cache is about to hit.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from penstock.connectors.alloc_pairing import fill_window, pieces_of
from penstock.connectors.alloc_windows import AllocatorConfig, Window, WindowSearch
from penstock.connectors.free_index import WORTHLESS, Extent, FreeIndex, Hold
from penstock.connectors.runs import Run, count_blocks, runs_of, slice_runs

__all__ = ["AllocatorConfig", "AllocatorStats", "RunAllocator"]


class _Request:
    """What the allocator knows of a request: announced size, reserved intervals in token order."""

    __slots__ = ("growth", "held", "plan", "prompt", "sender", "tail", "total")

    def __init__(self, config: AllocatorConfig) -> None:
        self.total = 0
        self.sender: Sequence[Run] = ()
        self.held = 0
        self.tail = -1
        self.plan: deque[tuple[int, int]] = deque()
        self.prompt = Hold(config.hold_price)
        self.growth = Hold(config.slack_price)

    def owns(self, extent: Extent) -> bool:
        return extent.holder is self.prompt or extent.holder is self.growth


@dataclass(slots=True)
class AllocatorStats:
    """Counters since the start: requests planned, blocks handed out, windows bought."""

    requests: int = 0
    blocks: int = 0
    windows: int = 0
    grown_in_place: int = 0
    grown_elsewhere: int = 0
    stolen: int = 0


class RunAllocator:
    """Mirror of a pool's free blocks that hands them out as few, old, well-aligned runs.

    Blocks are ids from 0 to ``num_blocks``; at the start none is free. Requests are named by any hashable
    key. Not thread-safe.
    """

    def __init__(self, num_blocks: int, config: AllocatorConfig | None = None) -> None:
        self.config = config or AllocatorConfig()
        self.stats = AllocatorStats()
        self._index = FreeIndex(num_blocks)
        self._windows = WindowSearch(self._index, self.config)
        self._requests: dict[object, _Request] = {}
        self._hits = bytearray(num_blocks)
        self._clock = 1
        self._touched = (0, 0)
        self._growth = float(self.config.most_slack) / 2
        self._buyer = _Request(self.config)

    @property
    def num_free(self) -> int:
        """Free blocks, whether reserved or not."""
        return self._index.num_free - (self._touched[1] - self._touched[0])

    def free_runs(self) -> list[Run]:
        """All free blocks, whether reserved or not, in ascending order. O(blocks)."""
        self._settle()
        return runs_of(block for e in self._index.extents() for block in range(e.start, e.stop))

    @property
    def num_known_requests(self) -> int:
        """Requests that are announced or hold blocks."""
        return len(self._requests)

    def release(self, blocks: Sequence[int], *, worthless: bool = False) -> None:
        """Blocks become free, given in eviction order. ``worthless``: nobody can hit their contents."""
        self._settle()
        first = 0
        count = len(blocks)
        while first < count:
            last = first
            hits = self._hits[blocks[first]]
            while (
                last + 1 < count
                and blocks[last + 1] == blocks[last] - 1
                and (worthless or self._hits[blocks[last + 1]] == hits)
            ):
                last += 1
            if last == first:
                while last + 1 < count and worthless and blocks[last + 1] == blocks[last] + 1:
                    last += 1
            low, high = min(blocks[first], blocks[last]), max(blocks[first], blocks[last])
            self._index.add(low, high + 1, WORTHLESS if worthless else self._clock, hits)
            self._clock += last + 1 - first
            first = last + 1

    def fetch(self, block: int) -> None:
        """A prefix hit takes ``block`` back from the free list. Neighbours in a row settle together."""
        if self._hits[block] < 255:
            self._hits[block] += 1
        start, stop = self._touched
        if block == stop and start < stop:
            self._touched = (start, stop + 1)
        else:
            self._settle()
            self._touched = (block, block + 1)

    def announce(self, key: object, num_blocks: int, sender_runs: Sequence[Run] = ()) -> None:
        """A request will need ``num_blocks`` blocks for its prompt, hits included.

        ``sender_runs`` are the blocks, in token order for the whole prompt, that a sender holds its copy in.
        """
        request = self._requests.setdefault(key, _Request(self.config))
        request.total, request.sender = num_blocks, tuple(sender_runs)

    def close(self, key: object) -> None:
        """The request gives its blocks back: nothing is reserved for it any more."""
        request = self._requests.get(key)
        if request is None:
            return
        if request.total and request.held >= request.total:
            self._growth += 0.05 * (min(request.held - request.total, 64) - self._growth)
        self._drop_plan(request)
        request.held, request.tail = 0, -1
        if request.total == 0:
            del self._requests[key]

    def forget(self, key: object) -> None:
        """Drop what was announced for the request, and its reservation."""
        request = self._requests.pop(key, None)
        if request is not None:
            self._drop_plan(request)

    def allocate(self, count: int, key: object | None = None, position: int = 0) -> list[int]:
        """Hand out ``count`` free blocks for positions from ``position`` of the request's block list.

        Raises:
            ValueError: fewer than ``count`` blocks are free.
        """
        self._settle()
        if count > self._index.num_free:
            raise ValueError(f"{count} blocks asked for, {self._index.num_free} are free")
        request = (
            _Request(self.config) if key is None else self._requests.setdefault(key, _Request(self.config))
        )
        taken = self._follow_plan(request, count)
        if len(taken) < count and request.held > 0:
            self._extend(request, count - len(taken))
            taken += self._follow_plan(request, count - len(taken))
        if len(taken) < count:
            missing = count - len(taken)
            self._make_plan(request, missing, position + len(taken))
            taken += self._follow_plan(request, missing)
        assert len(taken) == count, f"{count} blocks asked for, {len(taken)} found"
        for block in taken:
            self._hits[block] = 0
        request.held = position + count
        request.tail = taken[-1] + 1 if taken else request.tail
        self.stats.blocks += count
        if key is None:
            self._drop_plan(request)
        return taken

    def _follow_plan(self, request: _Request, count: int) -> list[int]:
        """Take up to ``count`` blocks off the front of the request's reserved intervals."""
        taken: list[int] = []
        while request.plan and len(taken) < count:
            position, stop = request.plan.popleft()
            extent = self._index.at(position)
            if extent is None or not request.owns(extent):
                if position + 1 < stop:
                    jump = position + 1 if extent is None else min(extent.stop, stop)
                    request.plan.appendleft((jump, stop))
                    if jump >= stop:
                        request.plan.popleft()
                continue
            end = min(extent.stop, stop, position + count - len(taken))
            self._index.cut(position, end, evict=True)
            taken.extend(range(position, end))
            if end < stop:
                request.plan.appendleft((end, stop))
        return taken

    def _drop_plan(self, request: _Request) -> None:
        while request.plan:
            self._let_go(request, *request.plan.popleft())

    def _let_go(self, request: _Request, position: int, stop: int) -> None:
        """What the request still holds of an interval becomes anybody's."""
        while position < stop:
            extent = self._index.at(position)
            end = position + 1 if extent is None else min(extent.stop, stop)
            if extent is not None and request.owns(extent):
                self._index.hold(position, end, None)
            position = end

    def _extend(self, request: _Request, count: int) -> None:
        """Reserve free blocks right behind the request's last one, unless others would miss them."""
        extent = self._index.at(request.tail)
        if extent is None or extent.holder is not None:
            return
        if self._windows.loss(extent, len(extent)) > self.config.growth_limit:
            return
        stop = min(extent.stop, request.tail + max(count, self._slack(request)))
        self._reserve(request, request.tail, stop, request.growth)
        self.stats.grown_in_place += 1

    def _make_plan(self, request: _Request, count: int, position: int) -> None:
        """Reserve windows for what the request still needs, and at least for ``count`` blocks."""
        self.stats.requests += request.held == 0
        self._buyer = request
        expected = max(count, request.total - position)
        if count == expected and position + count <= count_blocks(request.sender):
            self._plan_paired(request, slice_runs(request.sender, position, count), position)
        else:
            self._plan_windows(request, count, min(expected, self._index.num_free))

    def _plan_windows(self, request: _Request, count: int, expected: int) -> None:
        """Buy windows for ``count`` blocks, and good ones for what is ``expected`` later."""
        slack = self._slack(request)
        missing = expected
        while missing > 0:
            served = expected - missing >= count
            window = self._windows.cheapest(missing + slack, request)
            if window is None:
                if served or not self._steal(missing):
                    break
                continue
            if served and window.stop - window.start < min(missing, self.config.shortest_ahead):
                break
            missing -= self._buy(request, window, missing)

    def _buy(self, request: _Request, window: Window, missing: int) -> int:
        """Reserve up to ``missing`` blocks of a window for the prompt and the rest for growth."""
        self.stats.windows += 1
        prompt = min(window.stop - window.start, missing)
        middle = window.start + prompt
        self._reserve(request, window.start, middle, request.prompt)
        if middle < window.stop:
            self._reserve(request, middle, window.stop, request.growth)
        return prompt

    def _plan_paired(self, request: _Request, sender: Sequence[Run], position: int) -> None:
        """Buy windows for blocks that arrive from ``sender`` and line them up with its runs."""
        missing = count_blocks(sender)
        pieces = pieces_of(sender, position)
        placed: list[tuple[int, int, int]] = []
        slack = self._slack(request)
        while pieces:
            window = self._windows.cheapest(missing + slack, request)
            if window is None:
                if not self._steal(missing):
                    break
                continue
            if window.stop - window.start >= missing:
                pieces.sort()
            start = window.start
            for piece in fill_window(pieces, window.stop - window.start):
                placed.append((piece.offset, start, start + piece.length))
                start += piece.length
            self._index.hold(window.start, start, request.prompt)
            missing -= start - window.start
            self.stats.windows += 1
            if not pieces and start < window.stop:
                placed.append((position + count_blocks(sender), start, window.stop))
                self._index.hold(start, window.stop, request.growth)
        request.plan.extend((start, stop) for _, start, stop in sorted(placed))

    def _slack(self, request: _Request) -> int:
        """Blocks to reserve for growth: none behind a prompt that was received, which nobody pulls again."""
        if request.sender:
            return 0
        available = self._index.num_free - self._index.num_held
        wanted = int(self._growth * self.config.slack_factor + 1)
        return max(0, min(wanted, self.config.most_slack, available // self.config.slack_share))

    def _reserve(self, request: _Request, start: int, stop: int, hold: Hold) -> None:
        self._index.hold(start, stop, hold)
        request.plan.append((start, stop))

    def _steal(self, need: int) -> bool:
        """Free up to ``need`` blocks from the end of the longest reservation of another request."""
        victim = max(
            (r for r in self._requests.values() if r.plan and r is not self._buyer),
            key=lambda r: r.plan[-1][1] - r.plan[-1][0],
            default=None,
        )
        if victim is None:
            return False
        start, stop = victim.plan.pop()
        middle = max(start, stop - need)
        if start < middle:
            victim.plan.append((start, middle))
        self._let_go(victim, middle, stop)
        self.stats.stolen += 1
        return True

    def _settle(self) -> None:
        """Apply the prefix hits gathered since the last change."""
        start, stop = self._touched
        if start < stop:
            self._touched = (0, 0)
            self._index.cut(start, stop, evict=False)

    def check_integrity(self, free: Iterable[int] | None = None) -> None:
        """Assert all invariants; with ``free``, that exactly these blocks are free. O(blocks)."""
        self._settle()
        self._index.check_integrity()
        if free is not None:
            mine = {b for e in self._index.extents() for b in range(e.start, e.stop)}
            assert mine == set(free)
