"""A pool of blocks that hold real bytes: what the engines of these tests move between each other.

A block's right content follows from its key. Blocks are scribbled over when they are freed and again when
they are handed out, and a free block must not change: no stale, partial or late write goes unseen.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from penstock.connectors.compat import CompatibilityRecord
from penstock.connectors.config import FlowKVConfig
from penstock.connectors.geometry import CacheGeometry, LayerPages, strips_of

LAYERS = 3
PAGE = 32
TOKENS_A_BLOCK = 4


@lru_cache(maxsize=1 << 14)
def content(key: int, rank: int, size: int) -> bytes:
    """The right bytes of the block that ``key`` names."""
    return hashlib.shake_128(b"%d/%d" % (key, rank)).digest(size)


def geometry_over(memory: np.ndarray, layout: str, num_blocks: int) -> CacheGeometry:
    """``LAYERS`` layers of ``PAGE`` bytes a block: outermost blocks or layers, or blocks with gaps."""
    pages = {
        "BLHNC": LayerPages(LAYERS, PAGE, LAYERS * PAGE, PAGE),
        "LBHNC": LayerPages(LAYERS, num_blocks * PAGE, PAGE, PAGE),
        "gaps": LayerPages(LAYERS, PAGE, LAYERS * PAGE + 16, PAGE, offset=8),
    }[layout]
    return CacheGeometry(memory.ctypes.data, memory.nbytes, num_blocks, strips_of([pages]))


class Pool:
    """Blocks with real bytes on every rank, reference counts and allocation epochs."""

    def __init__(self, rng: random.Random, num_blocks: int, layout: str, ranks: int) -> None:
        self._rng = rng
        size = num_blocks * (LAYERS * PAGE + 16)
        self.memories = [np.zeros(size, dtype=np.uint8) for _ in range(ranks)]
        self.geometries = [geometry_over(memory, layout, num_blocks) for memory in self.memories]
        self.num_blocks = num_blocks
        self.epochs = np.zeros(num_blocks, dtype=np.uint32)
        self.users = [0] * num_blocks
        self._free = list(range(num_blocks))
        self._resting: dict[int, list[bytes]] = {}
        self._scribbles = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks, mostly in runs; whoever held them before finds other bytes there."""
        assert count <= len(self._free), "the test's pool is too small"
        at = self._rng.randrange(len(self._free) - count + 1)
        taken, self._free[at : at + count] = self._free[at : at + count], []
        for block in taken:
            self._check_untouched(block)
            self._scribble(block)
            self.users[block] = 1
        self.epochs[taken] += 1
        return taken

    def share(self, block: int) -> None:
        assert self.users[block]
        self.users[block] += 1

    def free(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            assert self.users[block], f"block {block} is freed twice"
            self.users[block] -= 1
            if not self.users[block]:
                self._scribble(block)
                self._resting[block] = self.bytes_of(block)
                self._free.insert(self._rng.randrange(len(self._free) + 1), block)
        if self._rng.random() < 0.5:
            self._free.sort()

    def churn(self) -> None:
        """Hand every free block to somebody else, and take it back."""
        self.free(self.allocate(len(self._free)))

    def write(self, block: int, key: int) -> None:
        for rank, geometry in enumerate(self.geometries):
            self._put(rank, block, content(key, rank, geometry.block_bytes))

    def bytes_of(self, block: int) -> list[bytes]:
        """The block's bytes on every rank."""
        return [self._get(rank, block) for rank in range(len(self.memories))]

    def holds(self, block: int, key: int) -> bool:
        """Whether the block's bytes are right on every rank."""
        wanted = [content(key, rank, g.block_bytes) for rank, g in enumerate(self.geometries)]
        return self.bytes_of(block) == wanted

    def check_integrity(self) -> None:
        """Free blocks have no user, and nobody wrote to them."""
        assert sorted(self._free) == [b for b in range(self.num_blocks) if not self.users[b]]
        for block in self._free:
            self._check_untouched(block)

    def _check_untouched(self, block: int) -> None:
        assert self._resting.get(block, self.bytes_of(block)) == self.bytes_of(block), (
            "a free block was written"
        )

    def _scribble(self, block: int) -> None:
        self._scribbles += 1
        for rank, geometry in enumerate(self.geometries):
            for strip in geometry.strips:
                start = strip.offset + block * strip.stride
                self.memories[rank][start : start + strip.width] = self._scribbles % 251

    def _get(self, rank: int, block: int) -> bytes:
        memory, strips = self.memories[rank], self.geometries[rank].strips
        starts = [strip.offset + block * strip.stride for strip in strips]
        return b"".join(memory[a : a + s.width].tobytes() for a, s in zip(starts, strips, strict=True))

    def _put(self, rank: int, block: int, data: bytes) -> None:
        for strip in self.geometries[rank].strips:
            start = strip.offset + block * strip.stride
            piece, data = data[: strip.width], data[strip.width :]
            self.memories[rank][start : start + strip.width] = np.frombuffer(piece, dtype=np.uint8)


def record_of(pool: Pool, config: FlowKVConfig, **changes: object) -> CompatibilityRecord:
    """The compatibility record of an engine over ``pool``, with some fields changed."""
    fields = {
        "engine": "test 1.0",
        "model": "tiny",
        "cache_dtype": "bfloat16",
        "block_size": TOKENS_A_BLOCK,
        "tensor_parallel_size": len(pool.memories),
        "num_layers": LAYERS,
        "num_kv_heads": 2,
        "head_size": 8,
        "layout": "any",
        "attention_backend": "none",
        "packing": "logical",
        "layer_order": "by name",
        "strip_widths": tuple(strip.width for strip in pool.geometries[0].strips),
        "digest": config.digest,
    }
    return CompatibilityRecord(**{**fields, **changes})
