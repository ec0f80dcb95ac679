"""Summaries of the blocks of a paged KV cache, by block number: blocks that requests share share them."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.attention import Partial
from penstock.kernels.sparse.page_clusters import PageClusters, log_page_masses

CODES = 127
"""Largest code of a mean's channel."""
SHIFT = 128
"""Added to a code: processors multiply unsigned bytes by signed ones."""
CHANNELS = 8
"""Of a cluster that lie together: with eight clusters, a line of the cache and the longest vector."""


def lanes_of(clusters: int) -> int:
    """How many of a block's ``clusters`` lie side by side, in one vector; the last one is filled up."""
    return 4 if clusters <= 4 else 8


class BlockIndex:
    """The clusters of each block of one layer, and the mean of its values.

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
        value_size: int = 0,
    ) -> None:
        """``value_size`` is that of the values whose means are kept; 0 keeps none."""
        self._clusters = max(1, block_tokens // summary_tokens)
        self._rounds = rounds
        # Means in 8 bits with a scale each: half the memory of 16 bits buys twice as many clusters. What a
        # block has of all heads lies together, since blocks of a request lie anywhere.
        self._lanes = lanes_of(self._clusters)
        places = -(-self._clusters // self._lanes) * self._lanes
        steps = -(-head_size // CHANNELS)
        self._codes = torch.empty(blocks, heads, steps, places, CHANNELS, dtype=torch.uint8)
        self._facts = torch.empty(blocks, heads, 3, places)
        self._values = torch.empty(blocks, heads, value_size, dtype=torch.int8)
        self._value_scales = torch.empty(blocks, heads)
        self._known = torch.zeros(blocks, dtype=torch.bool)

    @property
    def nbytes(self) -> int:
        """Memory in bytes if every block is summarised."""
        tables = self._known, self._codes, self._facts, self._values, self._value_scales
        return sum(table.nbytes for table in tables)

    @property
    def has_values(self) -> bool:
        """Whether blocks have means of values."""
        return self._values.shape[-1] > 0

    @property
    def blocks(self) -> int:
        """How many blocks it can tell apart."""
        return len(self._known)

    def missing(self, blocks: torch.Tensor) -> torch.Tensor:
        """Those of ``blocks`` (int64 [P]) that have no summary."""
        # Every step asks; NumPy takes a tenth of the time that torch does.
        known = self._known.numpy()[blocks.numpy()]
        return blocks[:0] if known.all() else blocks[torch.from_numpy(~known)]

    def put(self, blocks: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None = None) -> None:
        """Summarise ``blocks`` (int64 [P]), whose keys are ``keys`` [H, P, N, D], and ``values`` [H, P, N, V]
        where ``has_values``."""
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
        if self.has_values:
            assert values is not None
            self._put_values(blocks, values)
        self._known[blocks] = True

    def _put_values(self, blocks: torch.Tensor, values: torch.Tensor) -> None:
        means = values.float().mean(2).transpose(0, 1)
        scales = means.abs().amax(-1).clamp(min=1e-30) / CODES
        # As with keys, what is not finite shows in the scale.
        self._values[blocks] = (means / scales[..., None]).round().nan_to_num(0.0).to(torch.int8)
        self._value_scales[blocks] = scales

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

    def rest(
        self, blocks: torch.Tensor, shares: torch.Tensor, read: torch.Tensor, totals: torch.Tensor
    ) -> Partial:
        """What stands for those of ``blocks`` (int64 [P], none missing) that are not ``read``.

        ``shares`` float32 [H, G, P or more] are those of the blocks in estimated masses, of which ``totals``
        float32 [H, G] are the logs of the sums; ``read`` is bool [H, P or more]. Every token of a block is
        taken for the mean of its values. Output [H, G, V], log-sum-exp [H, G].
        """
        if not HAS_NUMBA:
            return self._rest(blocks, shares, read, totals)
        from penstock.kernels.sparse import fused_rest

        output = torch.empty(*totals.shape, self._values.shape[-1])
        lse = torch.empty_like(totals)
        arrays = self._values, self._value_scales, blocks, shares, read, totals, output, lse
        fused_rest.estimate(*(each.numpy() for each in arrays))
        return Partial(output, lse)

    def _rest(
        self, blocks: torch.Tensor, shares: torch.Tensor, read: torch.Tensor, totals: torch.Tensor
    ) -> Partial:
        count = len(blocks)
        weights = shares[..., :count].masked_fill(read[:, None, :count], 0.0)
        means = (self._values[blocks].float() * self._value_scales[blocks][..., None]).transpose(0, 1)
        sums = weights.sum(-1)
        # A block that is read is not multiplied either: zero times NaN is NaN.
        means = means.masked_fill(read[:, :count, None], 0.0)
        return Partial(weights @ means / sums[..., None].clamp(min=1e-30), totals + sums.log())

    def _log_masses(self, query: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        codes = self._codes[blocks].permute(1, 0, 3, 2, 4).flatten(-2)
        codes = codes[:, :, : self._clusters, : query.shape[-1]]
        facts = self._facts[blocks].transpose(0, 1)[..., : self._clusters]
        scales, spreads, rooms = facts.unbind(2)
        means = (codes.float() - SHIFT).flatten(1, 2)
        products = query @ means.transpose(1, 2) * scales.flatten(1)[:, None]
        return log_page_masses(query, products, rooms.exp(), spreads)
