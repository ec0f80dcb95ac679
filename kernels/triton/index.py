# ruff: noqa: ANN001, ANN202
"""The summaries of one layer's blocks, kept on the device without the host: who writes a block's last slot
summarises it, in the same step.

A page counts only where a request's length makes it full, and whoever made it full wrote its last slot. So a
summary that is read is of what stands in the block, whoever had it before; blocks of a cached prefix keep
theirs. Only what did not pass through ``written`` (blocks that a KV connector filled) must be marked unknown
when it changes hands, and is summarised by ``catch_up`` when it is decoded.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from penstock.kernels.triton.cache import PagedCache
from penstock.kernels.triton.launch import tile, warps
from penstock.kernels.triton.summaries import Summaries, summarise_one

PAGES = 1024
"""Pages that a program looks at a time."""
MOST_SHARE = 0.1
"""Of the KV cache, what summaries may take."""


def clusters_within(cache: PagedCache, summary_tokens: int) -> int:
    """Clusters of a block: one for ``summary_tokens``, or fewer, so that summaries stay in ``MOST_SHARE``.

    There is at least one, whatever it takes.
    """
    wanted = max(1, cache.block_tokens // summary_tokens)
    width = cache.keys.element_size() * cache.head_size
    # A cluster has its mean in bytes and three floats; a block the mean of its values, in the cache's type.
    fit = int((MOST_SHARE * 2 * cache.block_tokens * width - width) // (cache.head_size + 12))
    return max(1, min(wanted, fit))


@triton.jit
def _written(
    slots, known, keys, values, means, scales, sizes, spreads, mean_values,
    block_tokens, clusters, size, heads, rounds,
    key_block, key_token, key_head, value_block, value_token, value_head,
    TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    if (slot >= 0) & (slot % block_tokens == block_tokens - 1):
        block = slot // block_tokens
        summarise_one(
            block, tl.program_id(1).to(tl.int64), keys, values, means, scales, sizes, spreads, mean_values,
            block_tokens, clusters, size, heads, rounds,
            key_block, key_token, key_head, value_block, value_token, value_head,
            TOKENS, CLUSTERS, SIZE,
        )  # fmt: skip
        tl.store(known + block, 1)


@triton.jit
def _count(table, lengths, known, counts, pages, block_tokens, PAGES: tl.constexpr):
    request = tl.program_id(0).to(tl.int64)
    full = tl.minimum(tl.load(lengths + request) // block_tokens, pages)
    count = full
    for first in range(0, full, PAGES):
        page = first + tl.arange(0, PAGES)
        inside = page < full
        block = tl.load(table + request * pages + page, mask=inside, other=0).to(tl.int64)
        there = tl.load(known + block, mask=inside, other=1)
        count = tl.minimum(count, tl.min(tl.where(there == 0, page, full), 0))
    tl.store(counts + request, count)


@triton.jit
def _catch_up(
    table, lengths, counts, known, keys, values, means, scales, sizes, spreads, mean_values,
    pages, most, block_tokens, clusters, size, heads, rounds,
    key_block, key_token, key_head, value_block, value_token, value_head,
    TOKENS: tl.constexpr, CLUSTERS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    request = (tl.program_id(0) // most).to(tl.int64)
    # Not by what is known: another head's program may have said so already.
    page = tl.load(counts + request) + tl.program_id(0) % most
    if page < tl.minimum(tl.load(lengths + request) // block_tokens, pages):
        block = tl.load(table + request * pages + page).to(tl.int64)
        summarise_one(
            block, tl.program_id(1).to(tl.int64), keys, values, means, scales, sizes, spreads, mean_values,
            block_tokens, clusters, size, heads, rounds,
            key_block, key_token, key_head, value_block, value_token, value_head,
            TOKENS, CLUSTERS, SIZE,
        )  # fmt: skip
        tl.store(known + block, 1)


class DeviceIndex:
    """Summaries of all blocks of ``cache``, and which of them hold.

    Args:
        cache: the layer's; it stays where it is.
        clusters: of a block.
        rounds: of k-means.
        known: uint8 [blocks], 0 for all to begin with; layers may have rows of one tensor.
    """

    def __init__(self, cache: PagedCache, clusters: int, rounds: int, known: torch.Tensor) -> None:
        self.cache, self.known = cache, known
        self.summaries = Summaries.empty(cache, clusters)
        self._rounds = rounds

    @property
    def nbytes(self) -> int:
        """Memory in bytes."""
        return self.summaries.nbytes + self.known.nbytes

    def written(self, slots: torch.Tensor) -> None:
        """Keys and values were written to ``slots`` (int64 [T], block * N + position, below 0 for none):
        blocks that are full now are summarised.

        Tokens of a block must have been written by the time its last slot is.
        """
        if len(slots):
            _written[(len(slots), self.cache.heads)](slots, self.known, *self._operands(), **self._tiles())

    def count(self, table: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> None:
        """Full pages from the front that are summarised, of ``table`` int32 [B, P] and ``lengths`` int32 [B],
        into ``counts`` int32 [B]."""
        _count[(len(lengths),)](
            table, lengths, self.known, counts, table.shape[1], self.cache.block_tokens, PAGES=PAGES
        )

    def catch_up(self, table: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor, most: int) -> None:
        """Summarise up to ``most`` full pages of each request from ``counts`` on; ``counts`` stays."""
        keys, values, *summaries = self._arrays()
        _catch_up[(len(lengths) * most, self.cache.heads)](
            table, lengths, counts, self.known, keys, values, *summaries,
            table.shape[1], most, *self._numbers(), **self._tiles(),
        )  # fmt: skip

    def _operands(self) -> list[Any]:
        return [*self._arrays(), *self._numbers()]

    def _arrays(self) -> list[torch.Tensor]:
        kept = self.summaries
        return [
            self.cache.keys, self.cache.values, kept.means, kept.scales, kept.sizes, kept.spreads, kept.values
        ]  # fmt: skip

    def _numbers(self) -> list[int]:
        cache = self.cache
        return [
            cache.block_tokens, self.summaries.clusters, cache.head_size, cache.heads, self._rounds,
            *cache.keys.stride()[:3], *cache.values.stride()[:3],
        ]  # fmt: skip

    def _tiles(self) -> dict[str, int]:
        cache = self.cache
        tokens, size = tile(cache.block_tokens), tile(cache.head_size)
        return {
            "TOKENS": tokens,
            "CLUSTERS": tile(self.summaries.clusters),
            "SIZE": size,
            "num_warps": warps(tokens * size),
        }
