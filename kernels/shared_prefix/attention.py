"""Attention of a decode step over a paged KV cache in which prefixes are shared, on several threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.shared_prefix.layout import Layout
from penstock.kernels.threads import run_all

DTYPES = (torch.bfloat16, torch.float32)
HEAD_SIZES = 16
"""They are multiples of it."""


class SharedAttention:
    """Attention over the ``cache`` of a layer, [B, H, N, 2 * D]: of a head of a block, keys [D, N] come
    first, then values [N, D], with any strides that keep a head of a block together. It must live as long as
    this does. Not safe between threads.

    Raises:
        ValueError: compiled kernels do not read such a cache.
    """

    def __init__(self, cache: torch.Tensor) -> None:
        blocks, heads, tokens, width = cache.shape
        if (
            not HAS_NUMBA
            or cache.dtype not in DTYPES
            or width % (2 * HEAD_SIZES)
            or cache.stride()[1:] != (tokens * width, width, 1)
            or cache.stride(0) % cache.stride(1)
        ):
            raise ValueError(
                f"shared prefixes: given a cache {tuple(cache.shape)} of {cache.dtype} with strides "
                f"{cache.stride()}, allowed: bfloat16 or float32, heads of a multiple of {HEAD_SIZES} "
                "channels, each in one piece in a block; and Numba"
            )
        self._stride = cache.stride(0) // cache.stride(1)
        shape = (blocks - 1) * self._stride + heads, tokens * width
        self._rows = _numbers(cache.as_strided(shape, (cache.stride(1), 1), cache.storage_offset()))
        self._parts = np.empty((0, 0, 0), np.float32)
        self._lse = np.empty((0, 0), np.float32)

    def attend(
        self, query: torch.Tensor, layout: Layout, scale: float, group: int, output: torch.Tensor
    ) -> None:
        """Write the attention of ``query`` [B, H * G, D] to ``output``, both of the type of the cache.

        Nothing but what ``layout`` has of a request is read for it. ``group`` is G, ``output`` contiguous.
        """
        from penstock.kernels.shared_prefix import fused
        from penstock.kernels.sparse.running_softmax import merge

        asked, answer = _numbers(query.contiguous()), _numbers(output)
        count, heads, size = len(layout.members), query.shape[1], query.shape[2]
        if len(self._lse) < count or self._parts.shape[1:] != (heads, size):
            self._parts = np.empty((count, heads, size), np.float32)
            self._lse = np.empty((count, heads), np.float32)
        parts, lse = self._parts, self._lse
        jobs: list[Callable[[], None]] = [
            partial(
                fused.attend,
                self._rows,
                self._stride,
                layout.table,
                layout.items,
                layout.members,
                work,
                asked,
                group,
                scale,
                parts,
                lse,
            )
            for work in layout.work
        ]
        run_all(jobs, len(jobs))
        bounds = [layout.requests * k // len(jobs) for k in range(len(jobs) + 1)]
        run_all(
            [
                partial(merge, parts, lse, layout.starts, layout.slots, first, last, answer)
                for first, last in pairwise(bounds)
                if first < last
            ],
            len(jobs),
        )


def _numbers(tensor: torch.Tensor) -> Any:
    # NumPy knows no bfloat16; compiled kernels know its bits.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()


def warm_up(dtype: torch.dtype, heads: int, group: int, size: int, block_tokens: int) -> None:
    """Compile what ``SharedAttention`` calls, or load it from disk, with a cache of zeros."""
    from penstock.kernels.shared_prefix.layout import lay_out
    from penstock.kernels.shared_prefix.runs import shared_runs

    cache = torch.zeros(3, heads, block_tokens, 2 * size, dtype=dtype)
    tables = np.array([[0, 1], [0, 2]], np.int32)
    tokens = np.full(2, block_tokens + 1)
    runs = shared_runs(tables, tokens // block_tokens)
    layout = lay_out(tables, tokens, runs, block_tokens=block_tokens, heads=heads, group=group)
    query = torch.zeros(2, heads * group, size, dtype=dtype)
    SharedAttention(cache).attend(query, layout, 1.0, group, torch.empty_like(query))
