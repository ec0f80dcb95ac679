"""How much of a waiting request's prompt the prefix cache holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


def cached_prefix(manager: Any, request: Request) -> int:
    """Tokens of a request that a KV cache manager has cached; changes no block and no statistic."""
    if not manager.enable_caching or request.skip_reading_prefix_cache:
        return 0
    # As KVCacheManager.get_computed_blocks does: the last token is computed in any case.
    found = manager.coordinator.find_longest_cache_hit(request.block_hashes, request.num_tokens - 1)
    return int(found[1])
