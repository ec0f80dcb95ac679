"""The free blocks of a pool as extents: coalesced, ordered by age and size class.

An *extent* is a maximal stretch of consecutive free block ids that were released together, so that one age
describes all of it. Extents that hold nothing worth keeping (never cached, or cut off from the head of
their chain) have age zero and coalesce with their neighbours. Every operation touches a constant number of
extents and costs O(log extents), whatever the size of the pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, islice, pairwise

from sortedcontainers import SortedList

WORTHLESS = 0
"""Stamp of an extent whose contents nobody can hit."""


class Hold:
    """Marks blocks as reserved: still free and hittable, and sold to others only at ``price`` runs."""

    __slots__ = ("price",)

    def __init__(self, price: float) -> None:
        self.price = price


class Extent:
    """Free blocks ``start`` to ``stop``, last used at ``stamp``, in token order of one chain.

    ``hits`` counts how often the blocks came back from the free list to a prefix hit; ``holder`` is the
    reservation that other requests should leave alone, or None.
    """

    __slots__ = ("hits", "holder", "stamp", "start", "stop")

    def __init__(self, start: int, stop: int, stamp: int, hits: int, holder: Hold | None) -> None:
        self.start = start
        self.stop = stop
        self.stamp = stamp
        self.hits = hits
        self.holder = holder

    def __len__(self) -> int:
        return self.stop - self.start

    def __repr__(self) -> str:
        return f"Extent({self.start}, {self.stop}, stamp={self.stamp}, hits={self.hits})"


class AgeBands:
    """Counts free blocks by age in bands, to tell how deep in the eviction order a stamp stands. O(1)."""

    BANDS = 256

    def __init__(self, num_blocks: int) -> None:
        self._width = max(1, num_blocks // 128)
        self._base = 0
        self._counts = [0] * self.BANDS
        self._ahead: list[int] | None = None

    def add(self, stamp: int, count: int) -> None:
        """Count ``count`` more (or, negative, fewer) free blocks at ``stamp``."""
        band = stamp // self._width - self._base
        while band >= self.BANDS:
            half = self.BANDS // 2
            self._counts = [sum(self._counts[: half + 1]), *self._counts[half + 1 :], *([0] * half)]
            self._base += half
            band -= half
        self._counts[max(band, 0)] += count
        self._ahead = None

    def ahead_of(self, stamp: int) -> int:
        """How many free blocks are older than ``stamp``, within one band."""
        if self._ahead is None:
            self._ahead = list(accumulate(self._counts, initial=0))
        return self._ahead[min(max(stamp // self._width - self._base, 0), self.BANDS)]

    def total(self) -> int:
        return sum(self._counts)


class FreeIndex:
    """The set of free blocks of a pool of ``num_blocks``."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_free = 0
        self.num_held = 0
        self.num_worthless = 0
        self._extents: list[Extent | None] = [None] * num_blocks
        self._by_age: list[SortedList] = [SortedList() for _ in range(num_blocks.bit_length() + 1)]
        self._bands = AgeBands(num_blocks)

    def at(self, block: int) -> Extent | None:
        """The extent that ``block`` lies in, None where it is not free or outside the pool."""
        return self._extents[block] if 0 <= block < self.num_blocks else None

    def add(self, start: int, stop: int, stamp: int, hits: int = 0) -> None:
        """Blocks ``start`` to ``stop`` become free."""
        extent = Extent(start, stop, stamp, hits, None)
        self._map(start, stop, extent)
        self._enlist(extent)

    def cut(self, start: int, stop: int, *, evict: bool) -> None:
        """Blocks ``start`` to ``stop``, all free, leave the index.

        With ``evict`` their contents are lost, and what follows them in the same extent can be hit no more.
        """
        position = start
        while position < stop:
            extent = self._extents[position]
            assert extent is not None, f"block {position} is not free"
            end = min(extent.stop, stop)
            left, right = self._carve(extent, position, end)
            self._map(position, end, None)
            if left is not None:
                self._enlist(left)
            if right is not None:
                right.stamp = WORTHLESS if evict else right.stamp
                self._enlist(right)
            position = end

    def hold(self, start: int, stop: int, holder: Hold | None) -> None:
        """Give blocks ``start`` to ``stop``, all free, to ``holder``; None makes them anybody's."""
        position = start
        while position < stop:
            extent = self._extents[position]
            assert extent is not None, f"block {position} is not free"
            end = min(extent.stop, stop)
            if extent.holder is not holder:
                held = Extent(position, end, extent.stamp, extent.hits, holder)
                rests = self._carve(extent, position, end)
                self._map(position, end, None)
                for rest in rests:
                    if rest is not None:
                        self._enlist(rest)
                self._map(position, end, held)
                self._enlist(held)
            position = end

    def seeds(self, length: int, each: int) -> Iterator[Extent]:
        """The ``each`` oldest extents of each size class: best fits for ``length`` first.

        Classes that hold ``length`` blocks come in ascending order, then the smaller ones in descending
        order. Extents with a holder are left out.
        """
        fitting = min(length.bit_length(), len(self._by_age) - 1)
        for ages in (*self._by_age[fitting:], *reversed(self._by_age[:fitting])):
            if not ages:
                continue
            for _, start in islice(ages, each):
                extent = self._extents[start]
                assert extent is not None
                yield extent

    def depth(self, stamp: int) -> int:
        """How many free blocks the stock order would evict before one of ``stamp``, within one band."""
        return 0 if stamp == WORTHLESS else self.num_worthless + self._bands.ahead_of(stamp)

    def extents(self) -> Iterator[Extent]:
        """All extents in ascending order of blocks. O(blocks)."""
        position = 0
        while position < self.num_blocks:
            extent = self._extents[position]
            if extent is not None:
                yield extent
            position = position + 1 if extent is None else extent.stop

    def check_integrity(self) -> None:
        """Assert that map, age lists, bands and counters describe the same extents. O(blocks)."""
        extents = list(self.extents())
        for extent in extents:
            assert all(self._extents[b] is extent for b in range(extent.start, extent.stop))
        for left, right in pairwise(extents):
            mergeable = left.stop == right.start and left.stamp == right.stamp == WORTHLESS
            assert not mergeable or left.holder is not None or right.holder is not None, (left, right)
        free = sum(len(e) for e in extents)
        assert free == self.num_free == self.num_worthless + self._bands.total()
        assert self.num_worthless == sum(len(e) for e in extents if e.stamp == WORTHLESS)
        assert free == sum(1 for extent in self._extents if extent is not None)
        assert self.num_held == sum(len(e) for e in extents if e.holder is not None)
        listed = sorted((e.stamp, e.start) for e in extents if e.holder is None)
        assert listed == sorted(key for ages in self._by_age for key in ages)
        for size_class, ages in enumerate(self._by_age):
            for _, start in ages:
                extent_or_none = self._extents[start]
                assert extent_or_none is not None
                assert len(extent_or_none).bit_length() == size_class

    def _map(self, start: int, stop: int, extent: Extent | None) -> None:
        self._extents[start:stop] = [extent] * (stop - start)

    def _carve(self, extent: Extent, start: int, stop: int) -> tuple[Extent | None, Extent | None]:
        """Unlist ``extent`` and return what lies left and right of ``start`` to ``stop``, unlisted.

        The larger rest keeps the object, so that the map is rewritten for the smaller one only.
        """
        self._unlist(extent)
        first, last = extent.start, extent.stop
        left = right = None
        if start - first >= last - stop:
            extent.stop = start
            left = extent if first < start else None
            if stop < last:
                right = Extent(stop, last, extent.stamp, extent.hits, extent.holder)
                self._map(stop, last, right)
        else:
            extent.start = stop
            right = extent
            if first < start:
                left = Extent(first, start, extent.stamp, extent.hits, extent.holder)
                self._map(first, start, left)
        return left, right

    def _enlist(self, extent: Extent) -> None:
        """Enter a mapped extent into the age lists, after joining it with worthless neighbours."""
        if extent.stamp == WORTHLESS and extent.holder is None:
            for neighbour in (self.at(extent.start - 1), self.at(extent.stop)):
                if neighbour is not None and neighbour.stamp == WORTHLESS and neighbour.holder is None:
                    extent = self._absorb(extent, neighbour)
        self._count(extent, len(extent))
        if extent.holder is None:
            self._by_age[len(extent).bit_length()].add((extent.stamp, extent.start))

    def _absorb(self, extent: Extent, listed: Extent) -> Extent:
        """Join ``extent`` with an adjacent listed one; the smaller is written into the larger."""
        self._unlist(listed)
        small, large = (extent, listed) if len(extent) < len(listed) else (listed, extent)
        self._map(small.start, small.stop, large)
        large.start, large.stop = min(small.start, large.start), max(small.stop, large.stop)
        return large

    def _unlist(self, extent: Extent) -> None:
        self._count(extent, -len(extent))
        if extent.holder is None:
            self._by_age[len(extent).bit_length()].remove((extent.stamp, extent.start))

    def _count(self, extent: Extent, length: int) -> None:
        self.num_free += length
        if extent.holder is not None:
            self.num_held += length
        if extent.stamp == WORTHLESS:
            self.num_worthless += length
        else:
            self._bands.add(extent.stamp, length)
