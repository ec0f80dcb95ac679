"""Summaries of the blocks of a paged KV cache, by block number: blocks that requests share share them."""

from __future__ import annotations

import torch

from penstock.kernels.sparse.page_clusters import PageClusters


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
        dtype: torch.dtype,
    ) -> None:
        self._clusters = max(1, block_tokens // summary_tokens)
        self._rounds = rounds
        self._means = torch.empty(heads, blocks, self._clusters, head_size, dtype=dtype)
        self._sizes, self._spreads = (torch.empty(heads, blocks, self._clusters) for _ in range(2))
        self._known = torch.zeros(blocks, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Memory in bytes if every block is summarised."""
        return self._means.nbytes + self._sizes.nbytes + self._spreads.nbytes + self._known.nbytes

    @property
    def blocks(self) -> int:
        """How many blocks it can tell apart."""
        return len(self._known)

    def missing(self, blocks: torch.Tensor) -> torch.Tensor:
        """Those of ``blocks`` (int64 [P]) that have no summary."""
        return blocks[~self._known[blocks]]

    def put(self, blocks: torch.Tensor, keys: torch.Tensor) -> None:
        """Summarise ``blocks`` (int64 [P]), whose keys are ``keys`` [H, P, N, D]."""
        found = PageClusters.of(keys, self._clusters, self._rounds)
        self._means[:, blocks] = found.means.to(self._means.dtype)
        self._sizes[:, blocks] = found.sizes
        self._spreads[:, blocks] = found.spreads
        self._known[blocks] = True

    def forget(self, blocks: torch.Tensor) -> None:
        """Drop the summaries of ``blocks`` (int64 [P])."""
        self._known[blocks] = False

    def log_masses(self, query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """``PageClusters.log_page_masses`` of ``blocks`` (int64 [P], none missing); [H, G, P]."""
        return self._at(blocks).log_page_masses(query)

    def _at(self, blocks: torch.Tensor) -> PageClusters:
        first = int(blocks[0]) if len(blocks) else 0
        if torch.equal(blocks, torch.arange(first, first + len(blocks))):
            # Neighbouring blocks, as a fresh pool gives them, are read where they are.
            run = slice(first, first + len(blocks))
            return PageClusters(self._means[:, run], self._sizes[:, run], self._spreads[:, run])
        return PageClusters(
            *(table.index_select(1, blocks) for table in (self._means, self._sizes, self._spreads))
        )
