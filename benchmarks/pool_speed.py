"""What handing out blocks costs in processor time, by size of the pool.

An operation is one call of the free queue (``popleft_n``, ``remove``, ``append_n``, ``prepend_n``) as vLLM
makes it: a chunk of 32 blocks, one block of growth, one block of a prefix hit, one freed request. The pools
are half active, and everything free is cached.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from penstock.benchmarks.pool_engine import BLOCK_TOKENS, make_manager
from penstock.plugins.vllm.run_pool import RunPool

CHUNK_BLOCKS = 32
REQUEST_BLOCKS = 192
GROWTH_BLOCKS = 6
HIT_BLOCKS = 16
OPERATIONS = ("popleft_n", "remove", "append_n", "prepend_n")


class Stopwatch:
    """Adds up the thread's processor time inside a queue's operations, and counts calls and blocks."""

    def __init__(self, queue: object) -> None:
        self.calls = self.blocks = self.nanoseconds = 0
        for name in OPERATIONS:
            setattr(queue, name, self._timed(getattr(queue, name)))

    def _timed(self, operation: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def timed(argument: Any) -> Any:
            start = time.thread_time_ns()
            result = operation(argument)
            self.nanoseconds += time.thread_time_ns() - start
            self.calls += 1
            self.blocks += argument if isinstance(argument, int) else _count(argument)
            return result

        return timed


def _count(argument: KVCacheBlock | list[KVCacheBlock]) -> int:
    return len(argument) if isinstance(argument, list) else 1


def time_operations(sizes: tuple[int, ...], requests: int = 300) -> list[dict[str, Any]]:
    """One row a policy and pool size: microseconds an operation and a block, over ``requests`` requests."""
    rows = []
    for policy in ("stock", "flowkv"):
        for size in sizes:
            stopwatch = _churn(size, policy, requests)
            rows.append(
                {
                    "case": "speed",
                    "policy": policy,
                    "pool_blocks": size,
                    "operations": stopwatch.calls,
                    "us_per_operation": round(stopwatch.nanoseconds / stopwatch.calls / 1e3, 2),
                    "us_per_block": round(stopwatch.nanoseconds / stopwatch.blocks / 1e3, 3),
                }
            )
    return rows


def _churn(size: int, policy: str, requests: int) -> Stopwatch:
    manager = make_manager(size)
    pool = RunPool.install(manager) if policy == "flowkv" else None
    rng = random.Random(0)
    live: list[str] = []
    most_live = max(1, size // 2 // (REQUEST_BLOCKS + GROWTH_BLOCKS))
    filling = most_live + size // REQUEST_BLOCKS
    stopwatch = None
    for number in range(filling + requests):
        if number == filling:
            stopwatch = Stopwatch(manager.block_pool.free_block_queue)
        name = f"r{number}"
        if pool is not None:
            pool.announce(name, REQUEST_BLOCKS)
        others = rng.sample(live, 2) if len(live) > 2 else []
        _serve(manager, name, others, rng.randrange(1, size - HIT_BLOCKS))
        live.append(name)
        if len(live) > most_live:
            _end(manager, live.pop(rng.randrange(len(live))))
    assert stopwatch is not None
    return stopwatch


def _serve(manager: KVCacheManager, name: str, others: list[str], place: int) -> None:
    """Prefill in chunks while others grow by a block, then fetch some cached blocks back and free them."""
    blocks = manager.coordinator.single_type_managers[0]
    pool = manager.block_pool
    for held in range(CHUNK_BLOCKS, REQUEST_BLOCKS + 1, CHUNK_BLOCKS):
        blocks.allocate_new_blocks(name, held * BLOCK_TOKENS, held * BLOCK_TOKENS)
        for other in others:
            grown = (len(blocks.req_to_blocks[other]) + 1) * BLOCK_TOKENS
            blocks.allocate_new_blocks(other, grown, grown)
    around = pool.blocks[place : place + HIT_BLOCKS]
    hits = [block for block in around if block.ref_cnt == 0 and block.block_hash]
    pool.touch(hits)
    pool.free_blocks(reversed(hits))


def _end(manager: KVCacheManager, name: str) -> None:
    """Free a request whose blocks all stay cached."""
    blocks = manager.coordinator.single_type_managers[0]
    for number, block in enumerate(blocks.req_to_blocks[name]):
        if block.block_hash is None:
            block.set_block_hash(f"{name}/{number}".encode())
    blocks.free(name)
