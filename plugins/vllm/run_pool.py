"""Lets the run allocator choose blocks inside vLLM's own ``BlockPool``.

Seams, all on instances and all undone by ``uninstall``: the methods of the pool's ``FreeKVCacheBlockQueue``
(``vllm.v1.core.kv_cache_utils``), and ``allocate_new_blocks``, ``allocate_external_computed_blocks`` and
``pop_blocks_for_free`` of the one ``SingleTypeKVCacheManager``, which say for whom blocks are taken. vLLM's
linked list stays the exact eviction order; only the choice of what leaves it changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from penstock.connectors.allocator import AllocatorConfig, AllocatorStats, RunAllocator
from penstock.connectors.runs import Run

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

logger = logging.getLogger(__name__)

READING = frozenset({"get_all_free_blocks", "iter_blocks_after"})
CHANGING = frozenset({"popleft", "popleft_n", "remove", "append", "append_n", "prepend_n"})
REQUIRED = CHANGING | {"get_all_free_blocks"}
FOR_WHOM = ("allocate_new_blocks", "allocate_external_computed_blocks")


class RunPool:
    """The run allocator at work in one ``KVCacheManager``, or the reason why it is not.

    ``epochs`` counts, for each block, how often it was handed out (uint32, one entry a block); it counts in
    both cases. ``reason`` is None while the allocator chooses, and otherwise says why vLLM's order stands.
    """

    epochs: npt.NDArray[np.uint32]
    reason: str | None

    def __init__(self, kv_cache_manager: KVCacheManager, config: AllocatorConfig | None) -> None:
        pool = kv_cache_manager.block_pool
        self.epochs = np.zeros(len(pool.blocks), dtype=np.uint32)
        self.reason = why_not(kv_cache_manager)
        self._pool = pool
        self._blocks = pool.blocks
        self._queue: FreeKVCacheBlockQueue = pool.free_block_queue
        self._replaced: list[tuple[object, str]] = []
        self._current: str | None = None
        self._allocator = RunAllocator(len(pool.blocks), config)
        if self.reason is not None:
            logger.warning("FlowKV leaves vLLM's own order of free blocks: %s", self.reason)
            self._count_epochs_only()
            return
        self._manager: Any = kv_cache_manager.coordinator.single_type_managers[0]
        self._held: dict[str, list[KVCacheBlock]] = self._manager.req_to_blocks
        self._adopt_free_blocks()
        for name in sorted(CHANGING):
            self._replace(self._queue, name, getattr(self, "_" + name))
        for name in FOR_WHOM:
            self._replace(self._manager, name, self._tell_for_whom(getattr(self._manager, name)))
        self._pop_blocks_for_free = self._manager.pop_blocks_for_free
        self._replace(self._manager, "pop_blocks_for_free", self._close)

    @classmethod
    def install(cls, kv_cache_manager: KVCacheManager, *, config: AllocatorConfig | None = None) -> RunPool:
        """Put the allocator to work in ``kv_cache_manager``; a second call returns the first's result."""
        method = vars(kv_cache_manager.block_pool.free_block_queue).get("popleft_n")
        owner = getattr(method, "__self__", None)
        return owner if isinstance(owner, RunPool) else cls(kv_cache_manager, config)

    def uninstall(self) -> None:
        """Give every replaced method back; vLLM goes on from the same free list."""
        for owner, name in self._replaced:
            delattr(owner, name)
        self._replaced.clear()
        self.reason = self.reason or "it was uninstalled"

    @property
    def stats(self) -> AllocatorStats:
        """The allocator's counters since installation."""
        return self._allocator.stats

    @property
    def num_known_requests(self) -> int:
        """Requests that are announced or hold blocks."""
        return self._allocator.num_known_requests

    def announce(self, request_id: str, num_blocks: int, sender_runs: Sequence[Run] = ()) -> None:
        """Tell, before its first allocation, how many blocks the request's whole prompt needs.

        ``sender_runs`` are the runs, in token order for the whole prompt, that the sender holds it in; what
        local prefix hits cover is left out when the time comes.
        """
        if self.reason is None:
            self._allocator.announce(request_id, num_blocks, sender_runs)

    def forget(self, request_id: str) -> None:
        """Drop what was announced for the request. Unknown requests are ignored."""
        self._allocator.forget(request_id)

    def check_integrity(self) -> None:
        """Assert that the allocator's free set is exactly vLLM's free list. O(blocks)."""
        free = self._queue.get_all_free_blocks()
        assert len(free) == self._queue.num_free_blocks
        if self.reason is None:
            assert self._allocator.num_free == len(free)
            self._allocator.check_integrity(block.block_id for block in free)

    def _replace(self, owner: object, name: str, method: Callable[..., Any]) -> None:
        setattr(owner, name, method)
        self._replaced.append((owner, name))

    def _adopt_free_blocks(self) -> None:
        free = self._queue.get_all_free_blocks()
        for worthless, blocks in groupby(free, key=lambda block: block.block_hash is None):
            self._allocator.release([block.block_id for block in blocks], worthless=worthless)

    def _count_epochs_only(self) -> None:
        get_new_blocks = self._pool.get_new_blocks

        def counted(num_blocks: int) -> list[KVCacheBlock]:
            blocks = get_new_blocks(num_blocks)
            self.epochs[[block.block_id for block in blocks]] += 1
            return blocks

        self._replace(self._pool, "get_new_blocks", counted)

    def _tell_for_whom(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def told(request_id: str, *args: Any, **kwargs: Any) -> Any:
            self._current = request_id
            try:
                return method(request_id, *args, **kwargs)
            finally:
                self._current = None

        return told

    def _close(self, request_id: str) -> list[KVCacheBlock]:
        self._allocator.close(request_id)
        blocks: list[KVCacheBlock] = self._pop_blocks_for_free(request_id)
        return blocks

    def _popleft(self) -> KVCacheBlock:
        if self._queue.num_free_blocks == 0:
            raise ValueError("No free blocks available")
        return self._popleft_n(1)[0]

    def _popleft_n(self, n: int) -> list[KVCacheBlock]:
        if n == 0:
            return []
        request_id = self._current
        position = 0 if request_id is None else len(self._held[request_id])
        ids = self._allocator.allocate(n, request_id, position)
        self.epochs[ids] += 1
        taken = [self._blocks[block_id] for block_id in ids]
        for block in taken:
            before, after = block.prev_free_block, block.next_free_block
            before.next_free_block = after
            after.prev_free_block = before
            block.prev_free_block = block.next_free_block = None
        self._queue.num_free_blocks -= n
        return taken

    def _remove(self, block: KVCacheBlock) -> None:
        type(self._queue).remove(self._queue, block)
        self._allocator.fetch(block.block_id)

    def _append(self, block: KVCacheBlock) -> None:
        type(self._queue).append(self._queue, block)
        self._allocator.release([block.block_id])

    def _append_n(self, blocks: list[KVCacheBlock]) -> None:
        type(self._queue).append_n(self._queue, blocks)
        self._allocator.release([block.block_id for block in blocks])

    def _prepend_n(self, blocks: list[KVCacheBlock]) -> None:
        type(self._queue).prepend_n(self._queue, blocks)
        self._allocator.release([block.block_id for block in blocks], worthless=True)


def why_not(kv_cache_manager: KVCacheManager) -> str | None:
    """Why the run allocator does not fit this manager, or None if it does."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    managers = kv_cache_manager.coordinator.single_type_managers
    if len(managers) != 1:
        return f"the model has {len(managers)} KV cache groups, one is supported"
    manager = managers[0]
    if type(manager) is not FullAttentionManager:
        return f"the KV cache is managed by {type(manager).__name__}, FullAttentionManager is supported"
    queue = kv_cache_manager.block_pool.free_block_queue
    methods = {name for name in dir(type(queue)) if not name.startswith("_")}
    methods = {name for name in methods if callable(getattr(type(queue), name))}
    if unknown := methods - CHANGING - READING:
        return f"{type(queue).__name__} has unknown methods: {', '.join(sorted(unknown))}"
    if missing := REQUIRED - methods:
        return f"{type(queue).__name__} lacks {', '.join(sorted(missing))}"
    if absent := [name for name in (*FOR_WHOM, "pop_blocks_for_free") if not hasattr(manager, name)]:
        return f"{type(manager).__name__} lacks {', '.join(absent)}"
    return None
