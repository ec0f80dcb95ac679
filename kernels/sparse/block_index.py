"""Summaries of the blocks of a paged KV cache, by block number: blocks that requests share share them."""

from __future__ import annotations

import torch

from penstock.kernels.numba_support import HAS_NUMBA
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
        # Means in 8 bits with a scale each: half the memory of 16 bits buys twice as many clusters. What a
        # block has of all heads lies together, since blocks of a request lie anywhere.
        self._codes = torch.empty(blocks, heads, self._clusters, head_size, dtype=torch.int8)
        self._facts = torch.empty(blocks, heads, 3, self._clusters)
        self._known = torch.zeros(blocks, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Memory in bytes if every block is summarised."""
        return self._known.nbytes + self._codes.nbytes + self._facts.nbytes

    @property
    def blocks(self) -> int:
        """How many blocks it can tell apart."""
        return len(self._known)

    def missing(self, blocks: torch.Tensor) -> torch.Tensor:
        """Those of ``blocks`` (int64 [P]) that have no summary."""
        known = self._known[blocks]
        return blocks[:0] if known.all() else blocks[~known]

    def put(self, blocks: torch.Tensor, keys: torch.Tensor) -> None:
        """Summarise ``blocks`` (int64 [P]), whose keys are ``keys`` [H, P, N, D]."""
        found = PageClusters.of(keys, self._clusters, self._rounds)
        scales = found.means.abs().amax(-1).clamp(min=1e-30) / CODES
        # Keys that are not finite show in the scale; a code has no value for them.
        codes = (found.means / scales[..., None]).round().nan_to_num(0.0)
        self._codes[blocks] = codes.to(torch.int8).transpose(0, 1)
        facts = torch.stack([scales, found.spreads, found.sizes.log()], 2)
        self._facts[blocks] = facts.transpose(0, 1)
        self._known[blocks] = True

    def forget(self, blocks: torch.Tensor) -> None:
        """Drop the summaries of ``blocks`` (int64 [P])."""
        self._known[blocks] = False

    def log_masses(self, query: torch.Tensor, blocks: torch.Tensor, logs: torch.Tensor) -> None:
        """Write ``PageClusters.log_page_masses`` of ``query`` float32 [H, G, D] and ``blocks`` (int64 [P],
        none missing) to the first P of ``logs`` (float32 [H, G, P or more]); all contiguous."""
        if not HAS_NUMBA:
            logs[..., : len(blocks)] = self._log_masses(query, blocks)
            return
        from penstock.kernels.sparse import fused_masses

        lengths = query.square().sum(-1).mean(1)
        tables = self._codes.numpy(), self._facts.numpy()
        fused_masses.log_masses(*tables, blocks.numpy(), query.numpy(), lengths.numpy(), logs.numpy())

    def _log_masses(self, query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        codes, facts = self._codes[blocks].transpose(0, 1), self._facts[blocks].transpose(0, 1)
        scales, spreads, rooms = facts.unbind(2)
        products = query @ codes.float().flatten(1, 2).transpose(1, 2) * scales.flatten(1)[:, None]
        return log_page_masses(query, products, rooms.exp(), spreads)
