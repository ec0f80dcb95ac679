"""What windows of free blocks cost, and which is the cheapest.

The price of a window is stated in runs: one for the run itself, a share for what it evicts by age, extras
for a remainder that it leaves beside it and for blocks that others have reserved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.connectors.free_index import WORTHLESS, Extent, FreeIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorConfig:
    """Weights of the price. One setting serves all pools: ages count in shares of the pool's size."""

    age_weight: float = 0.2
    """Runs that evicting one block from the far end of a pool-sized eviction order is worth."""
    hit_weight: float = 3.0
    """How much dearer a block is that a prefix hit has fetched back before."""
    hold_price: float = 1.0
    """Runs that taking over blocks reserved for the prompt of another request is worth."""
    slack_price: float = 0.1
    """Runs that taking over blocks reserved for another request's growth is worth."""
    split_price: float = 0.6
    """Runs that leaving a remainder on one side of a window is worth."""
    growth_limit: float = 0.1
    """Most runs' worth of cache that decoding in place may evict before it moves elsewhere."""
    most_slack: int = 16
    """Most blocks reserved behind a prompt for the tokens to be decoded."""
    slack_factor: float = 1.5
    """Blocks reserved for growth, in multiples of what finished requests grew by on average."""
    slack_share: int = 128
    """Least number of unreserved free blocks for each block reserved for growth."""
    shortest_ahead: int = 96
    """Shortest window reserved for chunks to come; rather than less, wait for others to end."""
    seeds: int = 6
    """Oldest extents of each size class around which windows are tried."""


class Buyer(Protocol):
    """Who a window is for."""

    def owns(self, extent: Extent) -> bool:
        """True for blocks that the buyer has reserved already: no window may hold them."""
        ...


@dataclass(slots=True)
class Window:
    """Free blocks from ``start`` to before ``stop``, at ``price`` runs a block."""

    price: float
    start: int
    stop: int


class WindowSearch:
    """Looks for cheap windows in an index of free blocks."""

    def __init__(self, index: FreeIndex, config: AllocatorConfig) -> None:
        self._index = index
        self._config = config
        self._buyer: Buyer

    def loss(self, extent: Extent, count: int) -> float:
        """Runs that ``count`` blocks off the tail of ``extent`` are worth to the prefix cache.

        Each is worth as much as the share of the pool that the stock order would evict before it.
        """
        if extent.stamp == WORTHLESS:
            return 0.0
        depth = (self._index.depth(extent.stamp) + count / 2) * count / self._index.num_blocks
        return self._config.age_weight * depth * (1.0 + self._config.hit_weight * min(extent.hits, 3))

    def cheapest(self, length: int, buyer: Buyer) -> Window | None:
        """The window of at most ``length`` blocks with the lowest price per block, None if none is left."""
        self._buyer = buyer
        best: Window | None = None
        for seed in self._index.seeds(length, self._config.seeds):
            best = self._walk_right(seed, length, best)
            best = self._walk_left(seed, length, best)
        return best

    def _walk_right(self, seed: Extent, length: int, best: Window | None) -> Window | None:
        """Try windows that begin where ``seed`` begins. Cutting a head costs the whole extent."""
        at, split = self._index.at, self._config.split_price
        start = position = seed.start
        end = start + length
        cost = 1.0 + (split if self._is_open(at(start - 1)) else 0.0)
        extent: Extent | None = seed
        while extent is not None and position < end:
            if extent.holder is not None:
                if self._buyer.owns(extent):
                    break
                cost += extent.holder.price
            cost += self.loss(extent, len(extent))
            position = min(extent.stop, end)
            if position == extent.stop:
                extent = at(position)
            price = (cost + split if self._is_open(extent) else cost) / (position - start)
            if best is None or price < best.price:
                best = Window(price, start, position)
            elif cost > best.price * length:
                break
        return best

    def _walk_left(self, seed: Extent, length: int, best: Window | None) -> Window | None:
        """Try windows that end where ``seed`` ends. Cutting a tail costs only what is cut."""
        at, split = self._index.at, self._config.split_price
        stop = position = seed.stop
        end = stop - length
        cost = 1.0 + (split if self._is_open(at(stop)) else 0.0)
        extent: Extent | None = seed
        while extent is not None and position > end:
            if extent.holder is not None:
                if self._buyer.owns(extent):
                    break
                cost += extent.holder.price
            begin = max(extent.start, end)
            cost += self.loss(extent, position - begin)
            position = begin
            if position == extent.start:
                extent = at(position - 1)
            price = (cost + split if self._is_open(extent) else cost) / (stop - position)
            if best is None or price < best.price:
                best = Window(price, position, stop)
            elif cost > best.price * length:
                break
        return best

    @staticmethod
    def _is_open(extent: Extent | None) -> bool:
        """Whether anybody may take ``extent``: a window that stops beside it leaves a remainder."""
        return extent is not None and extent.holder is None
