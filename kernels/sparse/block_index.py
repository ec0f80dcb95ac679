"""Summaries of the blocks of a paged KV cache, by block number: blocks that requests share share them."""

from __future__ import annotations

import torch

from penstock.kernels.sparse.page_clusters import PageClusters, log_page_masses

CODES = 127
"""Largest code of a mean's channel."""


class BlockIndex:
    """The clusters of each block of one layer.

    A summary is taken when it is first needed and holds until ``forget``: whoever hands a block out for other
    tokens must say so. Memory is reserved for all blocks at once, and the system provides it as blocks are
    summarised. Not safe between threads.
    """

    def __init__(
        self,
        *,
        blocks: int,
        heads: int,
        block_tokens: int,
        head_size: int,
        summary_tokens: int,
        rounds: int,
    ) -> None:
        self._clusters = max(1, block_tokens // summary_tokens)
        self._rounds = rounds
        # Means in 8 bits with a scale each: half the memory of 16 bits buys twice as many clusters.
        self._codes = torch.empty(heads, blocks, self._clusters, head_size, dtype=torch.int8)
        self._scales, self._sizes, self._spreads = (
            torch.empty(heads, blocks, self._clusters) for _ in range(3)
        )
        self._known = torch.zeros(blocks, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Memory in bytes if every block is summarised."""
        return self._known.nbytes + sum(table.nbytes for table in self._tables)

    @property
    def blocks(self) -> int:
        """How many blocks it can tell apart."""
        return len(self._known)

    @property
    def _tables(self) -> tuple[torch.Tensor, ...]:
        return self._codes, self._scales, self._sizes, self._spreads

    def missing(self, blocks: torch.Tensor) -> torch.Tensor:
        """Those of ``blocks`` (int64 [P]) that have no summary."""
        return blocks[~self._known[blocks]]

    def put(self, blocks: torch.Tensor, keys: torch.Tensor) -> None:
        """Summarise ``blocks`` (int64 [P]), whose keys are ``keys`` [H, P, N, D]."""
        found = PageClusters.of(keys, self._clusters, self._rounds)
        scales = found.means.abs().amax(-1).clamp(min=1e-30) / CODES
        # Keys that are not finite show in the scale; a code has no value for them.
        codes = (found.means / scales[..., None]).round().nan_to_num(0.0)
        self._codes[:, blocks] = codes.to(torch.int8)
        self._scales[:, blocks] = scales
        self._sizes[:, blocks] = found.sizes
        self._spreads[:, blocks] = found.spreads
        self._known[blocks] = True

    def forget(self, blocks: torch.Tensor) -> None:
        """Drop the summaries of ``blocks`` (int64 [P])."""
        self._known[blocks] = False

    def log_masses(self, query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """``PageClusters.log_page_masses`` of ``blocks`` (int64 [P], none missing); [H, G, P]."""
        codes, scales, sizes, spreads = self._at(blocks)
        rows = codes.bfloat16().flatten(1, 2)
        products = torch.bmm(query.bfloat16(), rows.transpose(1, 2)).float() * scales.flatten(1)[:, None]
        return log_page_masses(query.float(), products, sizes, spreads)

    def _at(self, blocks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        first = int(blocks[0]) if len(blocks) else 0
        if torch.equal(blocks, torch.arange(first, first + len(blocks))):
            # Neighbouring blocks, as a fresh pool gives them, are read where they are.
            return tuple(table[:, first : first + len(blocks)] for table in self._tables)
        return tuple(table.index_select(1, blocks) for table in self._tables)
