"""Orders of handing out free blocks that the run allocator is compared with, inside the same block pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue, KVCacheBlock

from penstock.benchmarks.pool_engine import Engine
from penstock.plugins.vllm.run_pool import RunPool

Policy = Literal["stock", "address-sorted", "best-fit", "flowkv", "flowkv-unpaired"]
Choice = Callable[[npt.NDArray[np.bool_], int], npt.NDArray[np.int64]]


def lowest_addresses(free: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.int64]:
    """The free blocks with the lowest ids: an address-sorted free list, as SGLang keeps in P/D modes."""
    return np.flatnonzero(free)[:count]


def best_fit(free: npt.NDArray[np.bool_], count: int) -> npt.NDArray[np.int64]:
    """The smallest stretch of free blocks that suffices, else the largest ones. Ignores age."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], free.astype(np.int8), [0]))))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    fitting = np.flatnonzero(lengths >= count)
    if len(fitting):
        start = starts[fitting[np.argmin(lengths[fitting])]]
        return np.arange(start, start + count)
    chosen: list[npt.NDArray[np.int64]] = []
    for stretch in np.argsort(-lengths, kind="stable"):
        taken = min(int(lengths[stretch]), count)
        chosen.append(np.arange(starts[stretch], starts[stretch] + taken))
        count -= taken
        if count == 0:
            break
    return np.concatenate(chosen)


def choose_by(manager: KVCacheManager, choice: Choice) -> None:
    """Let ``choice`` pick what leaves the free queue of ``manager``, whatever its age. O(blocks) a call."""
    queue: FreeKVCacheBlockQueue = manager.block_pool.free_block_queue
    blocks = manager.block_pool.blocks
    free = np.zeros(len(blocks), dtype=np.bool_)
    free[[block.block_id for block in queue.get_all_free_blocks()]] = True
    remove, append_n, prepend_n = queue.remove, queue.append_n, queue.prepend_n

    def popleft_n(count: int) -> list[KVCacheBlock]:
        taken = [blocks[block_id] for block_id in choice(free, count)] if count else []
        for block in taken:
            removed(block)
        return taken

    def removed(block: KVCacheBlock) -> None:
        remove(block)
        free[block.block_id] = False

    def freed(put: Callable[[list[KVCacheBlock]], None]) -> Callable[[list[KVCacheBlock]], None]:
        def put_back(returned: list[KVCacheBlock]) -> None:
            put(returned)
            free[[block.block_id for block in returned]] = True

        return put_back

    queue.popleft_n, queue.remove = popleft_n, removed
    queue.append_n, queue.prepend_n = freed(append_n), freed(prepend_n)


def equip(manager: KVCacheManager, policy: Policy, step_tokens: int = 1024) -> Engine:
    """An engine on ``manager`` whose blocks are handed out by ``policy``."""
    if policy == "address-sorted":
        choose_by(manager, lowest_addresses)
    elif policy == "best-fit":
        choose_by(manager, best_fit)
    elif policy != "stock":
        pool = RunPool.install(manager)
        paired = policy == "flowkv"
        return Engine(
            manager,
            step_tokens=step_tokens,
            announce=lambda name, blocks, runs: pool.announce(name, blocks, runs if paired else ()),
            forget=pool.forget,
        )
    return Engine(manager, step_tokens=step_tokens)
