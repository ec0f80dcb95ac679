"""A paged KV cache of one row a token, [S, H, D], as SGLang keeps it: its keys, and attention over pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.attention import Partial, attend, merge
from penstock.kernels.sparse.head_rows import Read
from penstock.kernels.sparse.paged_keys import Keys
from penstock.kernels.threads import run_all


class TokenPages(Keys):
    """Keys and values of one layer, ``keys`` [S, H, D] and ``values`` [S, H, V], of any stride between slots.

    Block ``b`` has the slots from ``b * page_tokens`` on. Both tensors must live as long as this does.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._pages = _paged(keys, page_tokens), _paged(values, page_tokens)
        self._strides = keys.stride(0), values.stride(0)
        self._width = values.shape[2]
        rows = _rows(keys), _rows(values)
        self._rows = None if rows[0] is None or rows[1] is None else rows

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self._pages[0])

    @property
    def is_compiled(self) -> bool:
        """Whether compiled kernels read these tensors, and not torch, which copies what it reads."""
        return self._rows is not None

    def read(self, blocks: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """``penstock.kernels.sparse.paged_keys.Keys.read``."""
        return self._pages[0][:, :, heads].index_select(0, blocks).permute(2, 0, 1, 3)

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor:
        """``penstock.kernels.sparse.paged_keys.Keys.read_values``."""
        return self._pages[1].index_select(0, blocks).permute(2, 0, 1, 3)

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
        from penstock.kernels.sparse import fused_tokens

        fused_tokens.exact_log_masses(
            self._rows[0],
            self._strides[0],
            heads.start or 0,
            self._page_tokens,
            blocks.numpy(),
            pages.numpy(),
            query.numpy(),
            tail,
            logs.numpy(),
        )

    def attend(self, queries: torch.Tensor, reads: Sequence[Read]) -> Partial:
        """Attention of ``queries`` float32 [B, H, G, D], multiplied by the softmax scale, each over what its
        request reads; output [B, H, G, V] and log-sum-exp [B, H, G], float32.

        Other pages are not read, or, without Numba, none but the request's own; what stands for them is
        merged in.
        """
        found = self._attend_all(queries, reads)
        for row, read in enumerate(reads):
            if read.rest is not None:
                part = merge(Partial(found.output[row], found.lse[row]), read.rest)
                found.output[row], found.lse[row] = part
        return found

    def _attend_all(self, queries: torch.Tensor, reads: Sequence[Read]) -> Partial:
        if self._rows is None:
            parts = [self._attend(query, read) for query, read in zip(queries, reads, strict=True)]
            return Partial(
                torch.stack([part.output for part in parts]), torch.stack([part.lse for part in parts])
            )
        queries = queries.contiguous()
        output = queries.new_empty(*queries.shape[:3], self._width)
        lse = queries.new_empty(queries.shape[:3])
        threads = torch.get_num_threads()
        jobs = self._jobs(queries, reads, output, lse, _shares(queries.shape[1], -(-threads // len(reads))))
        run_all(jobs, threads)
        return Partial(output, lse)

    def _jobs(
        self,
        queries: torch.Tensor,
        reads: Sequence[Read],
        output: torch.Tensor,
        lse: torch.Tensor,
        shares: Sequence[tuple[int, int]],
    ) -> Iterator[partial[None]]:
        """Some heads of a request each, for compiled code, which holds no lock."""
        from penstock.kernels.sparse import fused_tokens

        assert self._rows is not None
        for row, read in enumerate(reads):
            query, pages = queries[row], read.pages
            if pages is None:
                pages = torch.ones(len(query), len(read.blocks), dtype=torch.bool)
            for heads in shares:
                yield partial(
                    fused_tokens.attend,
                    *self._rows,
                    self._strides,
                    heads,
                    self._page_tokens,
                    read.blocks.numpy(),
                    pages.numpy(),
                    read.tail,
                    query.numpy(),
                    output[row].numpy(),
                    lse[row].numpy(),
                )

    def _attend(self, query: torch.Tensor, read: Read) -> Partial:
        heads, count = len(query), len(read.blocks)
        pages = torch.ones(heads, count, dtype=torch.bool) if read.pages is None else read.pages
        # Pages that a head reads come first, in their order; where it reads fewer than others, it gets some
        # of the request's others, which are masked.
        most = int(pages.sum(1).max())
        order = (~pages).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        within = torch.arange(self._page_tokens)
        tokens = pages.gather(1, order)[:, :, None] & ((order < count - 1)[:, :, None] | (within < read.tail))
        numbers, every = read.blocks[order], torch.arange(heads)[:, None]
        keys, values = (
            pages_[numbers[:, :, None], within, every[:, :, None]].flatten(1, 2) for pages_ in self._pages
        )
        return attend(query, keys, values, tokens.flatten(1))


def _paged(rows: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """``rows`` [S, H, D] as [P, N, H, D]; slots beyond the last whole page belong to none."""
    pages = len(rows) // page_tokens
    return rows[: pages * page_tokens].unflatten(0, (pages, page_tokens))


def _rows(rows: torch.Tensor) -> Any:
    """Rows as compiled kernels read them, one array of all; None where they do not."""
    slots, heads, size = rows.shape
    if (
        not HAS_NUMBA
        or rows.dtype not in (torch.bfloat16, torch.float32)
        or rows.stride()[1:] != (size, 1)
        or rows.device.type != "cpu"
    ):
        return None
    length = (slots - 1) * rows.stride(0) + heads * size
    flat = rows.detach().as_strided((length,), (1,), rows.storage_offset())
    # NumPy knows no bfloat16; compiled kernels know its bits.
    return (flat.view(torch.int16) if rows.dtype == torch.bfloat16 else flat).numpy()


def _shares(heads: int, parts: int) -> list[tuple[int, int]]:
    """``heads`` in about so many parts, none empty."""
    size = -(-heads // max(1, parts))
    return [(first, min(first + size, heads)) for first in range(0, heads, size)]
