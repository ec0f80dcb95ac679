"""How much of a waiting request's prompt the prefix cache holds, without touching the cache."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from vllm.v1.kv_cache_interface import FullAttentionSpec

if TYPE_CHECKING:
    from vllm.v1.request import Request

THE_ONLY_GROUP = [0]


class CachedPrefix:
    """Looks prefixes up in the cache of a scheduler; changes no block and no statistic.

    Where all layers attend to the whole context, a block is of use with all before it, and vLLM frees a
    request's blocks last one first: the cached part of a chain of hashes is its beginning, whose end is
    found by halving. A block that is gone from the middle all the same makes the result wrong, and so the
    order; an admission does not notice, since vLLM itself walks. Other models are walked.
    """

    def __init__(self, scheduler: Any) -> None:
        self._manager = scheduler.kv_cache_manager
        groups = scheduler.kv_cache_config.kv_cache_groups
        self._halves = len(groups) == 1 and isinstance(groups[0].kv_cache_spec, FullAttentionSpec)
        self._block_tokens = scheduler.hash_block_size

    def tokens_of(self, request: Request) -> int:
        """Tokens of the request's prompt that are cached; the last one is computed in any case."""
        if not self._manager.enable_caching or request.skip_reading_prefix_cache:
            return 0
        if not self._halves:
            found = self._manager.coordinator.find_longest_cache_hit(
                request.block_hashes, request.num_tokens - 1
            )
            return int(found[1])
        hashes = request.block_hashes
        most = min(len(hashes), (request.num_tokens - 1) // self._block_tokens)
        cached = self._manager.block_pool.get_cached_block
        if not most or cached(hashes[0], THE_ONLY_GROUP) is None:
            return 0
        blocks = bisect_left(
            range(most), True, lo=1, key=lambda block: cached(hashes[block], THE_ONLY_GROUP) is None
        )
        return blocks * self._block_tokens
