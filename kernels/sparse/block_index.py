"""Summaries of the blocks of a paged KV cache, by block number: blocks that requests share share them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.page_clusters import PageClusters, log_page_masses

CODES = 127
"""Largest code of a mean's channel."""
SHIFT = 128
"""Added to a code: processors multiply unsigned bytes by signed ones."""
CHANNELS = 4
"""Of a cluster that lie together, as wide as the sum of their products."""


def lanes_of(clusters: int) -> int:
    """How many of a block's ``clusters`` lie side by side, in one vector; the last one is filled up."""
    return next((lanes for lanes in (4, 8) if clusters <= lanes), 16)


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
        self._lanes = lanes_of(self._clusters)
        places = -(-self._clusters // self._lanes) * self._lanes
        steps = -(-head_size // CHANNELS)
        self._codes = torch.empty(blocks, heads, steps, places, CHANNELS, dtype=torch.uint8)
        self._facts = torch.empty(blocks, heads, 3, places)
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
        codes = (found.means / scales[..., None]).round().nan_to_num(0.0) + SHIFT
        room = self._facts.shape[-1] - self._clusters
        codes = pad(codes, (0, -codes.shape[-1] % CHANNELS, 0, room)).unflatten(-1, (-1, CHANNELS))
        self._codes[blocks] = codes.to(torch.uint8).permute(1, 0, 3, 2, 4)
        # What fills a vector up has the size of nothing.
        sizes = pad(found.sizes, (0, room)).log()
        facts = [pad(scales, (0, room)), pad(found.spreads, (0, room)), sizes]
        self._facts[blocks] = torch.stack(facts, 2).transpose(0, 1)
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

        tables = self._codes.numpy(), self._facts.numpy()
        fused_masses.log_masses(*tables, blocks.numpy(), query.numpy(), self._lanes, logs.numpy())

    def _log_masses(self, query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        codes = self._codes[blocks].permute(1, 0, 3, 2, 4).flatten(-2)
        codes = codes[:, :, : self._clusters, : query.shape[-1]]
        facts = self._facts[blocks].transpose(0, 1)[..., : self._clusters]
        scales, spreads, rooms = facts.unbind(2)
        means = (codes.float() - SHIFT).flatten(1, 2)
        products = query @ means.transpose(1, 2) * scales.flatten(1)[:, None]
        return log_page_masses(query, products, rooms.exp(), spreads)
