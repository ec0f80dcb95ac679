"""KV heads as requests of one head: how one call of a kernel reads other blocks in every head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.attention import Partial


class HeadRows(NamedTuple):
    """A block table of one row a request and KV head: ``table`` int32 [B * H, most], padded with 0, and
    ``lengths`` int32 [B * H], tokens in the row's blocks."""

    table: torch.Tensor
    lengths: torch.Tensor


class Read(NamedTuple):
    """What a request reads: its ``blocks`` (int64 [P]), those of them that each head reads (bool [H, P],
    the last one true; None for all), the ``tail``, tokens in the last block, and the ``rest``, what stands
    for the others: output [H, G, V] and log-sum-exp [H, G]."""

    blocks: torch.Tensor
    pages: torch.Tensor | None
    tail: int
    rest: Partial | None = None


def head_rows(reads: Sequence[Read], heads: int, block_tokens: int, stride: int) -> HeadRows:
    """Rows for a cache in which head ``h`` of block ``b`` is number ``b * stride + h``.

    Blocks stay in the order of their positions, so that only the last one of a row is partial.
    """
    if HAS_NUMBA:
        return _compiled_rows(reads, heads, block_tokens, stride)
    rows = [_rows(read, heads, block_tokens, stride) for read in reads]
    most = max(row.table.shape[1] for row in rows)
    tables = [torch.nn.functional.pad(row.table, (0, most - row.table.shape[1])) for row in rows]
    return HeadRows(torch.cat(tables), torch.cat([row.lengths for row in rows]))


def _rows(read: Read, heads: int, block_tokens: int, stride: int) -> HeadRows:
    numbers = (read.blocks * stride)[None] + torch.arange(heads)[:, None]
    if read.pages is None:
        tokens = (len(read.blocks) - 1) * block_tokens + read.tail
        return HeadRows(numbers.int(), torch.full((heads,), tokens, dtype=torch.int32))
    counts = read.pages.sum(1)
    most = int(counts.max())
    order = (~read.pages).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    used = torch.arange(most) < counts[:, None]
    table = torch.where(used, numbers.gather(1, order), 0).int()
    return HeadRows(table, ((counts - 1) * block_tokens + read.tail).int())


def _compiled_rows(reads: Sequence[Read], heads: int, block_tokens: int, stride: int) -> HeadRows:
    from penstock.kernels.sparse import fused_choice

    count = len(reads) * heads
    table = torch.zeros(count, max(len(read.blocks) for read in reads), dtype=torch.int32)
    lengths = torch.empty(count, dtype=torch.int32)
    most = 0
    for number, read in enumerate(reads):
        rows = slice(number * heads, (number + 1) * heads)
        pages = read.pages
        if pages is None:
            pages = torch.ones(heads, len(read.blocks), dtype=torch.bool)
        found = fused_choice.list_blocks(
            read.blocks.numpy(),
            pages.numpy(),
            stride,
            block_tokens,
            read.tail,
            table.numpy()[rows],
            lengths.numpy()[rows],
        )
        most = max(most, found)
    return HeadRows(table[:, :most].contiguous(), lengths)
