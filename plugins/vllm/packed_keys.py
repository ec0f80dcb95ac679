"""Keys of vLLM's CPU KV cache, whatever order the kernels of this CPU keep them in."""

from __future__ import annotations

from functools import lru_cache

import torch
from vllm import _custom_ops as ops

DIGIT = 256
"""Whole numbers up to it are exact in every type of a cache."""


@lru_cache(maxsize=16)
def key_order(isa: str, dtype: torch.dtype, block_tokens: int, head_size: int) -> torch.Tensor | None:
    """Where the kernels for ``isa`` put each channel of a block's keys: int64 [N * D], or None for [D, N].

    Found by writing a block of numbers through vLLM's own kernel and looking where they are.
    """
    size = block_tokens * head_size
    number = torch.arange(size)
    low, high = (
        _written(digit, isa, dtype, block_tokens, head_size) for digit in (number % DIGIT, number // DIGIT)
    )
    order = torch.empty(size, dtype=torch.int64)
    order[low + DIGIT * high] = number
    transposed = number.view(head_size, block_tokens).t().flatten()
    return None if torch.equal(order, transposed) else order


def _written(numbers: torch.Tensor, isa: str, dtype: torch.dtype, tokens: int, size: int) -> torch.Tensor:
    """``numbers`` (int64 [N * D]) as they lie in the key part of a block that was written with them."""
    cache = torch.zeros(1, 1, 2 * tokens, size, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    rows = numbers.to(dtype).view(tokens, 1, size)
    ops.cpu_attn_reshape_and_cache(rows, rows, keys, values, torch.arange(tokens), isa)
    return keys.flatten().long()


class PackedKeys:
    """The keys of one layer's cache [B, H, N, 2 * D], of any strides that keep a head of a block together."""

    def __init__(self, cache: torch.Tensor, isa: str) -> None:
        blocks, heads, tokens, width = cache.shape
        self._shape = tokens, width // 2
        # Keys come first in a head of a block, values behind them.
        self._keys = cache.as_strided(
            (blocks, heads, tokens * self._shape[1]),
            (cache.stride(0), cache.stride(1), 1),
            cache.storage_offset(),
        )
        self._order = key_order(isa, cache.dtype, *self._shape)

    def read(self, blocks: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """``penstock.kernels.sparse.paged_decode.Keys.read``."""
        tokens, size = self._shape
        packed = self._keys[:, heads].index_select(0, blocks).transpose(0, 1)
        if self._order is not None:
            return packed[..., self._order].unflatten(-1, (tokens, size))
        return packed.unflatten(-1, (size, tokens)).transpose(-1, -2)
