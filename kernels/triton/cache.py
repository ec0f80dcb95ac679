"""A paged KV cache of any engine, as kernels see it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class PagedCache:
    """``keys`` and ``values`` of one layer, [blocks, N, H, D] views whatever their order in memory.

    The channels of a token lie together. vLLM's ``[blocks, H, N, 2 * D]`` is ``PagedCache(*(part.transpose(1,
    2) for part in cache.chunk(2, -1)))``, in either of its layouts.

    Raises:
        ValueError: shapes or types differ, or channels are apart.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __post_init__(self) -> None:
        if self.keys.dim() != 4 or self.keys.shape != self.values.shape:
            given = f"{tuple(self.keys.shape)} and {tuple(self.values.shape)}"
            raise ValueError(f"keys and values: given {given}, allowed: two alike of [blocks, N, H, D]")
        if self.keys.dtype != self.values.dtype:
            raise ValueError(
                f"keys and values: given {self.keys.dtype} and {self.values.dtype}, allowed: one type"
            )
        if self.keys.stride(-1) != 1 or self.values.stride(-1) != 1:
            raise ValueError("keys and values: given channels that lie apart, allowed: stride 1")

    @property
    def block_tokens(self) -> int:
        """``N``, tokens of a block."""
        return self.keys.shape[1]

    @property
    def heads(self) -> int:
        """``H``, KV heads."""
        return self.keys.shape[2]

    @property
    def head_size(self) -> int:
        """``D``."""
        return self.keys.shape[3]
