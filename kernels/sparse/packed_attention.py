"""Attention over chosen blocks of a cache as vLLM's CPU kernels keep it, with its log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.attention import Partial, attend
from penstock.kernels.sparse.head_rows import HeadRows, Read
from penstock.kernels.threads import run_all

DTYPES = (torch.bfloat16, torch.float32)
HEAD_SIZES, BLOCK_TOKENS = 16, 32
"""They are multiples of these."""
SPLITS = 4
"""Parts for each thread, so that none waits long for another."""

Numbers = npt.NDArray[np.int64]


class PackedAttention:
    """Attention over the ``cache`` of a layer, [B, H, N, 2 * D]: of a head of a block, keys [D, N] come
    first, then values [N, D], with any strides that keep a head of a block together. It must live as long as
    this does."""

    def __init__(self, cache: torch.Tensor) -> None:
        blocks, heads, tokens, width = cache.shape
        stride = cache.stride(0) // cache.stride(1)
        shape = (blocks - 1) * stride + heads, tokens * width
        self._rows = _numbers(cache.as_strided(shape, (cache.stride(1), 1), cache.storage_offset()))

    @staticmethod
    def reads(cache: torch.Tensor) -> bool:
        """Whether compiled kernels read a cache of this type and shape."""
        _, _, tokens, width = cache.shape
        return (
            HAS_NUMBA
            and cache.dtype in DTYPES
            and width % (2 * HEAD_SIZES) == 0
            and tokens % BLOCK_TOKENS == 0
            and cache.stride()[1:] == (tokens * width, width, 1)
            and cache.stride(0) % cache.stride(1) == 0
        )

    def attend(
        self,
        query: torch.Tensor,
        rows: HeadRows,
        starts: torch.Tensor,
        scale: float,
        output: torch.Tensor,
        rest: Partial | None = None,
    ) -> None:
        """Write the attention of ``query`` [T, G, D] over the blocks of ``rows`` to ``output``, which is
        contiguous; both are of the type of the cache.

        Queries from ``starts[b]`` to before ``starts[b + 1]`` (int32 [B + 1]) are the last tokens of row
        ``b``; each sees what is before it. ``rest`` is what stands for tokens that are not read.
        """
        from penstock.kernels.sparse import fused_attention
        from penstock.kernels.sparse.running_softmax import merge

        threads = torch.get_num_threads()
        table, lengths, bounds = rows.table.numpy(), rows.lengths.numpy(), starts.numpy()
        items, owners = _plan(lengths, bounds, self._tokens(query), threads)
        parts = np.empty((len(owners), *query.shape[1:]), np.float32)
        lse = np.empty(parts.shape[:2], np.float32)
        asked, answer = _numbers(query.contiguous()), _numbers(output)
        jobs = [
            partial(
                fused_attention.attend,
                self._rows,
                table,
                lengths,
                bounds,
                some,
                asked,
                scale,
                parts,
                lse,
            )
            for some in _shares(items, threads)
        ]
        run_all(jobs, threads)
        if rest is not None:
            parts = np.concatenate([parts, rest.output.numpy()])
            lse = np.concatenate([lse, rest.lse.numpy()])
            owners = np.concatenate([owners, np.arange(len(query))])
        behind = np.concatenate([[0], np.bincount(owners, minlength=len(query)).cumsum()])
        merge(parts, lse, behind, np.argsort(owners, kind="stable"), 0, len(query), answer)

    def _tokens(self, query: torch.Tensor) -> int:
        return int(self._rows.shape[1]) // (2 * query.shape[2])


def _plan(lengths: Any, starts: Any, tokens: int, threads: int) -> tuple[Numbers, Numbers]:
    """Items as ``fused_attention.attend`` has them, and the query of each part: rows are cut where one would
    keep a thread busy for long."""
    pages = -(-lengths.astype(np.int64) // tokens)
    most = pages.max() if threads == 1 else -(-pages.sum() // (threads * SPLITS))
    counts = -(-pages // most)
    row = np.repeat(np.arange(len(pages)), counts)
    first = (np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)) * most
    asked = np.diff(starts)[row]
    at = asked.cumsum() - asked
    items = np.stack([row, first, np.minimum(first + most, pages[row]), at], 1)
    return items, np.repeat(starts[row] - at, asked) + np.arange(asked.sum())


def _shares(items: Numbers, threads: int) -> list[Numbers]:
    """Neighbouring items for each thread, with about as many pages for one as for another."""
    before = (items[:, 2] - items[:, 1]).cumsum()
    bounds = np.searchsorted(before, before[-1] * np.arange(1, threads) / threads, "right")
    edges = [0, *bounds.tolist(), len(items)]
    return [items[first:last] for first, last in pairwise(edges) if first < last]


def rests(reads: Sequence[Read], counts: Sequence[int], heads: int, group: int, size: int) -> Partial | None:
    """What stands for the pages that are not read, of all requests together; None where none has any.

    Request ``b`` has ``counts[b]`` query rows, each in all of its ``heads``: its rest, [H, rows * G, V],
    becomes the next H * rows of output [T, G, V] and log-sum-exp [T, G].
    """
    if all(read.rest is None for read in reads):
        return None
    nothing = [
        Partial(torch.zeros(heads * rows, group, size), torch.full((heads * rows, group), -torch.inf))
        if read.rest is None
        else Partial(read.rest.output.view(-1, group, size), read.rest.lse.view(-1, group))
        for read, rows in zip(reads, counts, strict=True)
    ]
    return Partial(torch.cat([part.output for part in nothing]), torch.cat([part.lse for part in nothing]))


def attend_in_torch(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rows: HeadRows, starts: torch.Tensor
) -> Partial:
    """``PackedAttention.attend`` of ``query`` [T, G, D], with the softmax scale in it, over ``keys`` and
    ``values`` [R, N, D] of the rows of a cache; output [T, G, D] and log-sum-exp [T, G]."""
    tokens = keys.shape[1]
    found = []
    for blocks, length, (first, last) in zip(
        rows.table.long(), rows.lengths.tolist(), pairwise(starts.tolist()), strict=True
    ):
        pages = blocks[: -(-length // tokens)]
        own_keys, own_values = (part[pages].flatten(0, 1)[None, :length] for part in (keys, values))
        for row in range(first, last):
            seen = torch.arange(length)[None] <= length - last + row
            found.append(attend(query[row][None], own_keys, own_values, seen))
    return Partial(torch.cat([part.output for part in found]), torch.cat([part.lse for part in found]))


def _numbers(tensor: torch.Tensor) -> Any:
    # NumPy knows no bfloat16; compiled kernels know its bits.
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
