"""Digests of KV blocks: what the sender hashed is what the receiver must find.

A digest is one uint64 a block over the block's bytes in all strips. On DRAM it is XXH3-64; a device has a
kernel of its own with another algorithm name, which the compatibility record compares.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from penstock.connectors.config import DigestMode
from penstock.connectors.geometry import CacheGeometry

Digests = npt.NDArray[np.uint64]
SAMPLE_EVERY = 16
"""In ``sampled`` mode one block in this many is hashed, and always the last one."""


class Pending(Protocol):
    """Digests that may still be computed."""

    def ready(self) -> bool:
        """True once ``result`` returns at once."""
        ...

    def result(self) -> Digests:
        """One digest a block; waits where it must."""
        ...


class Digester(Protocol):
    """Hashes blocks of one rank's KV cache."""

    algorithm: str

    def begin(self, blocks: Sequence[int]) -> Pending:
        """Hash the blocks as the work queued so far leaves them; returns without waiting for a device."""
        ...

    def digests(self, blocks: Sequence[int]) -> Digests:
        """One digest a block, in the order given; shape (len(blocks),)."""
        ...


@dataclass(slots=True, frozen=True)
class Ready:
    """Digests that are known."""

    digests: Digests

    def ready(self) -> bool:
        """Always."""
        return True

    def result(self) -> Digests:
        """The digests."""
        return self.digests


class DramDigester:
    """XXH3-64 over host memory."""

    algorithm = "xxh3-64"

    def __init__(self, geometry: CacheGeometry) -> None:
        self._geometry = geometry
        self._memory = memoryview((ctypes.c_uint8 * geometry.size).from_address(geometry.base_address)).cast(
            "B"
        )

    def begin(self, blocks: Sequence[int]) -> Ready:
        """Hash at once."""
        return Ready(self.digests(blocks))

    def digests(self, blocks: Sequence[int]) -> Digests:
        """One digest a block; reads ``block_bytes`` a block."""
        strips = self._geometry.strips
        memory = self._memory
        out = np.empty(len(blocks), dtype="<u8")
        for i, block in enumerate(blocks):
            seed = 0
            for strip in strips:
                start = strip.offset + int(block) * strip.stride
                seed = xxhash.xxh3_64_intdigest(memory[start : start + strip.width], seed)
            out[i] = seed
        return out


def sampled_positions(num_blocks: int, mode: DigestMode) -> list[int]:
    """Positions of a request's blocks, in token order, that are hashed under ``mode``."""
    if mode == "off" or not num_blocks:
        return []
    if mode == "full":
        return list(range(num_blocks))
    return sorted({*range(0, num_blocks, SAMPLE_EVERY), num_blocks - 1})
