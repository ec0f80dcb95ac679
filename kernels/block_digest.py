"""Digests of KV blocks in device memory: one pass over the bytes, one uint64 a block.

The digest of a block is the sum, modulo 2**64, of ``mix(word[i] + (i + 1) * GOLDEN)`` over its 64-bit words,
where ``mix`` is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014). A sum may be formed in any
order, so the kernel needs no second pass; the position enters through the multiple of ``GOLDEN``, so moved,
swapped and repeated words change it. It detects faults, not forgers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from penstock.kernels.triton_support import HAS_TRITON

ALGORITHM = "splitmix64-sum"
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
SHIFTS = (30, 27, 31)
WORD_BYTES = 8
Digests = npt.NDArray[np.uint64]


def signed(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit ``value``: torch has no uint64 arithmetic."""
    return value - (1 << 64) if value >= 1 << 63 else value


def digest_words(words: torch.Tensor) -> torch.Tensor:
    """Reference: digests of ``words``, int64 of shape (blocks, words a block); returns int64 (blocks,)."""
    index = torch.arange(1, words.shape[1] + 1, dtype=torch.int64, device=words.device)
    x = words + index * signed(GOLDEN)
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        # ">>" keeps the sign of an int64; the mask makes it the unsigned shift.
        x = x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))
        if multiplier is not None:
            x = x * signed(multiplier)
    return x.sum(dim=1)


@dataclass(slots=True)
class PendingDigests:
    """Digests that a device is computing; ``ready`` never waits."""

    host: torch.Tensor
    event: torch.cuda.Event | None

    def ready(self) -> bool:
        """True once ``result`` returns at once."""
        return self.event is None or self.event.query()

    def result(self) -> Digests:
        """uint64 of shape (blocks,); waits where it must."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.numpy().view(np.uint64)


class DeviceDigester:
    """Hashes blocks of one allocation on the device that holds it.

    Args:
        memory: the whole allocation as int64 words, one-dimensional.
        strips: (offset, width, stride) in bytes of each strip of a block (``connectors.geometry.Strip``).

    Raises:
        ValueError: a strip is not a whole number of 64-bit words.
    """

    algorithm = ALGORITHM

    def __init__(self, memory: torch.Tensor, strips: Sequence[tuple[int, int, int]]) -> None:
        if any(size % WORD_BYTES for strip in strips for size in strip):
            raise ValueError(f"strips {list(strips)} are not whole 64-bit words")
        self._memory = memory
        self._strips = [tuple(size // WORD_BYTES for size in strip) for strip in strips]
        self._stream = torch.cuda.Stream(memory.device) if memory.is_cuda else None

    def begin(self, blocks: Sequence[int]) -> PendingDigests:
        """Hash after the work that is queued on the current stream; returns at once."""
        digests = self._launch(blocks)
        if not digests.is_cuda:
            return PendingDigests(digests, None)
        host = torch.empty(digests.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(digests, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return PendingDigests(host, event)

    def digests(self, blocks: Sequence[int]) -> Digests:
        """Hash bytes that are in place already, on a stream of its own; waits for the result."""
        if self._stream is None:
            return self.begin(blocks).result()
        with torch.cuda.stream(self._stream):
            return self.begin(blocks).result()

    def _launch(self, blocks: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor(blocks, dtype=torch.int64).to(self._memory.device, non_blocking=True)
        total = torch.zeros(len(blocks), dtype=torch.int64, device=self._memory.device)
        for number, (offset, width, stride) in enumerate(self._strips, start=1):
            # An odd factor a strip keeps a swap of two equal strips from cancelling out.
            total += (2 * number - 1) * self._strip(ids, offset, width, stride)
        return total

    def _strip(self, ids: torch.Tensor, offset: int, width: int, stride: int) -> torch.Tensor:
        if HAS_TRITON and self._memory.is_cuda:
            from penstock.kernels.block_digest_triton import digest_blocks

            return digest_blocks(self._memory, ids, offset, width, stride)
        columns = torch.arange(width, device=ids.device)
        return digest_words(self._memory[offset + ids[:, None] * stride + columns])
