"""How much of a waiting request's prompt the prefix cache holds, without touching the cache."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

THE_ONLY_GROUP = [0]


class CachedPrefix:
    """Looks prefixes up in the cache of a scheduler; changes no block and no statistic.

    Where all layers attend to the whole context, a block is of use with all before it, and vLLM frees a
    request's blocks last one first: the cached part of a chain of hashes is its beginning, whose end is
    found by halving, or in two steps where it is still where it was. A block that is gone from the middle
    all the same makes the result wrong, and so the order; an admission does not notice, since vLLM itself
    walks. Other models are walked.
    """

    def __init__(self, scheduler: Any) -> None:
        self._manager = scheduler.kv_cache_manager
        groups = scheduler.kv_cache_config.kv_cache_groups
        self._halves = len(groups) == 1 and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)
        self._block_tokens = scheduler.hash_block_size

    def tokens_of(self, request: Request, before: int = 0) -> int:
        """Tokens of the request's prompt that are cached; the last one is computed in any case. ``before`` is
        what an earlier call found."""
        if not self._manager.enable_caching or request.skip_reading_prefix_cache:
            return 0
        if not self._halves:
            found = self._manager.coordinator.find_longest_cache_hit(
                request.block_hashes, request.num_tokens - 1
            )
            return int(found[1])
        most = min(len(request.block_hashes), (request.num_tokens - 1) // self._block_tokens)
        return self._block_tokens * self._end(
            request.block_hashes, most, min(most, before // self._block_tokens)
        )

    def _end(self, hashes: Sequence[BlockHash], most: int, guess: int) -> int:
        """How many of the first ``most`` blocks are cached. A block that waits is seldom in the processor's
        caches, so what counts is how many are looked at."""
        cached = self._manager.block_pool.get_cached_block

        def missing(block: int) -> bool:
            return cached(hashes[block], THE_ONLY_GROUP) is None

        if guess and missing(guess - 1):
            return bisect_left(range(guess - 1), True, key=missing)
        if guess == most or missing(guess):
            return guess
        return bisect_left(range(most), True, lo=guess + 1, key=missing)
