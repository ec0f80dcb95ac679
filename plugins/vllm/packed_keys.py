"""Keys of vLLM's CPU KV cache, whatever order the kernels of this CPU keep them in."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from vllm import _custom_ops as ops

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.packed_attention import PackedAttention
from penstock.kernels.sparse.paged_keys import Keys

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


@lru_cache(maxsize=16)
def lies_plain(isa: str, dtype: torch.dtype, tokens: int, size: int) -> bool:
    """Whether the kernels ``isa`` keep keys of a block as [D, N] and values as [N, D]: found by writing."""
    cache = torch.zeros(1, 1, 2 * tokens, size, dtype=dtype)
    keys, values = cache.chunk(2, dim=2)
    # Few enough numbers that each is exact in every type, in an order that no other order looks like.
    rows = torch.randint(256, (2, tokens, 1, size), generator=torch.Generator().manual_seed(0)).to(dtype)
    ops.cpu_attn_reshape_and_cache(rows[0], rows[1], keys, values, torch.arange(tokens), isa)
    written = rows[0, :, 0].t().flatten(), rows[1].flatten()
    return all(torch.equal(part.flatten(), want) for part, want in zip((keys, values), written, strict=True))


def own_attention(cache: torch.Tensor, isa: str) -> PackedAttention | None:
    """Our kernel over the ``cache`` of a layer, [B, H, N, 2 * D]; None where only stock's reads it."""
    _, _, tokens, width = cache.shape
    if not PackedAttention.reads(cache) or not lies_plain(isa, cache.dtype, tokens, width // 2):
        return None
    return PackedAttention(cache)


class PackedKeys(Keys):
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
        values = cache.as_strided(
            (blocks, heads, *self._shape),
            (cache.stride(0), cache.stride(1), self._shape[1], 1),
            cache.storage_offset() + tokens * self._shape[1],
        )
        self._values = values if lies_plain(isa, cache.dtype, *self._shape) else None
        self._order = key_order(isa, cache.dtype, *self._shape)
        self._places = (torch.empty(0, dtype=torch.int64) if self._order is None else self._order).numpy()
        self._stride = cache.stride(0) // cache.stride(1)
        self._rows = _rows(cache, self._stride)

    def read(self, blocks: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """``penstock.kernels.sparse.paged_keys.Keys.read``."""
        tokens, size = self._shape
        packed = self._keys[:, heads].index_select(0, blocks).transpose(0, 1)
        if self._order is not None:
            return packed[..., self._order].unflatten(-1, (tokens, size))
        return packed.unflatten(-1, (size, tokens)).transpose(-1, -2)

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor | None:
        """``penstock.kernels.sparse.paged_keys.Keys.read_values``."""
        return None if self._values is None else self._values.index_select(0, blocks).transpose(0, 1)

    def log_masses(
        self,
        query: torch.Tensor,
        blocks: torch.Tensor,
        pages: torch.Tensor,
        tail: int,
        logs: torch.Tensor,
        heads: slice = slice(None),
    ) -> None:
        """``penstock.kernels.sparse.paged_keys.Keys.log_masses``, in one pass where it is compiled."""
        if self._rows is None:
            super().log_masses(query, blocks, pages, tail, logs, heads)
            return
        from penstock.kernels.sparse import fused_exact

        fused_exact.exact_log_masses(
            self._rows,
            self._stride,
            heads.start or 0,
            self._places,
            blocks.numpy(),
            pages.numpy(),
            query.numpy(),
            tail,
            logs.numpy(),
        )


def _rows(cache: torch.Tensor, stride: int) -> Any:
    """The cache as compiled kernels read it, or None where they do not."""
    blocks, heads, tokens, width = cache.shape
    if (
        not HAS_NUMBA
        or cache.dtype not in (torch.bfloat16, torch.float32)
        or cache.stride(1) != tokens * width
    ):
        return None
    shape = (blocks - 1) * stride + heads, tokens * width
    rows = cache.as_strided(shape, (cache.stride(1), 1), cache.storage_offset())
    # NumPy knows no bfloat16; compiled kernels know its bits.
    return (rows.view(torch.int16) if cache.dtype == torch.bfloat16 else rows).numpy()
