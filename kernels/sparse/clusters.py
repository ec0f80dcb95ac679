"""Tokens in the order of their clusters, and what is known of each cluster without reading its tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.kernels.sparse import kmeans


@dataclass(frozen=True, slots=True)
class Clusters:
    """A partition of the first ``m`` tokens of a request, for each KV head.

    ``order`` int64 [H, m] has the tokens cluster by cluster; ``owner`` int64 [H, m] the cluster at each
    position of ``order``; ``sizes`` float32 [H, C]; ``centroids``, and ``values`` (means of the values), [H,
    C, D];
    ``spreads`` [H, C] the mean square of a channel's distance to the centroid.
    """

    order: torch.Tensor
    owner: torch.Tensor
    sizes: torch.Tensor
    centroids: torch.Tensor
    values: torch.Tensor
    spreads: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, values: torch.Tensor, labels: torch.Tensor, clusters: int) -> Clusters:
        """The clusters that ``labels`` (int64 [H, m]) name; empty ones have size 0 and a zero centroid."""
        order = labels.argsort(dim=1, stable=True)
        owner = labels.gather(1, order)
        counts = torch.zeros(labels.shape[0], clusters, device=keys.device)
        counts.scatter_add_(1, owner, torch.ones_like(owner, dtype=torch.float32))
        centroids = _means(keys, labels, counts)
        gaps = keys.float() - _rows(centroids, labels)
        spreads = torch.zeros_like(counts).scatter_add_(1, labels, gaps.square().mean(-1))
        return cls(
            order, owner, counts, centroids, _means(values, labels, counts), spreads / counts.clamp(min=1)
        )

    @property
    def tokens(self) -> int:
        """``m``, of which all are in a cluster."""
        return self.order.shape[1]

    def followed_by(self, later: Clusters) -> Clusters:
        """These, then those of the tokens that follow."""
        return Clusters(
            torch.cat([self.order, later.order + self.tokens], 1),
            torch.cat([self.owner, later.owner + self.sizes.shape[1]], 1),
            *(
                torch.cat([getattr(self, name), getattr(later, name)], 1)
                for name in ("sizes", "centroids", "values", "spreads")
            ),
        )

    def check_integrity(self) -> None:
        """Raise AssertionError unless every token is in exactly one cluster."""
        tokens = torch.arange(self.tokens, device=self.order.device)
        assert torch.equal(self.order.sort(1).values, tokens.expand_as(self.order)), "tokens miss or repeat"
        counts = torch.zeros_like(self.sizes)
        counts.scatter_add_(1, self.owner, torch.ones_like(self.owner, dtype=torch.float32))
        assert torch.equal(counts, self.sizes), "sizes differ from members"


def by_kmeans(keys: torch.Tensor, values: torch.Tensor, average: int, iterations: int, seed: int) -> Clusters:
    """k-means of all tokens at once, one cluster for ``average`` of them (as in Tactic)."""
    count = max(1, keys.shape[1] // average)
    return Clusters.of(keys, values, kmeans.assign(keys, count, iterations, seed), count)


def bounded(keys: torch.Tensor, values: torch.Tensor, size: int, iterations: int, seed: int) -> Clusters:
    """The same, with clusters of more than ``size`` tokens cut into such of at most ``size``.

    k-means leaves clusters of one to a hundred tokens, and a kernel wants a bound. The cuts follow the
    position of tokens, and so what RoPE makes alike. Heads have unlike numbers of clusters: those with fewer
    get empty ones at the end.
    """
    heads, tokens = keys.shape[:2]
    count = max(1, tokens // size)
    labels = kmeans.assign(keys, count, iterations, seed)
    order = labels.argsort(dim=1, stable=True)
    owner = labels.gather(1, order)
    counts = torch.zeros(heads, count, dtype=torch.int64, device=keys.device)
    counts.scatter_add_(1, owner, torch.ones_like(owner))
    pieces = (counts + size - 1) // size
    within = torch.arange(tokens, device=keys.device) - (counts.cumsum(1) - counts).gather(1, owner)
    cut = (pieces.cumsum(1) - pieces).gather(1, owner) + within // size
    total = int(pieces.sum(1).max()) if tokens else 1
    return Clusters.of(keys, values, torch.empty_like(labels).scatter_(1, order, cut), total)


def log_masses(products: torch.Tensor, deviations: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Logs of the sums of exponentials of scores that are normal: means ``products``, ``sizes`` of them.

    A few numbers of wide ``deviations`` never reach the mean of the log-normal, which rests on rare large
    ones: past ``sqrt(2 log size)`` their sum is that of the largest (the random energy model; Derrida 1981).
    Empty clusters are -inf. Shapes broadcast.
    """
    room = sizes.clamp(min=1).log()
    free = room + deviations.square() / 2
    frozen = deviations * (2 * room).sqrt()
    above = torch.where(deviations.square() < 2 * room, free, frozen).masked_fill(sizes == 0, -torch.inf)
    return products + above


def _means(rows: torch.Tensor, labels: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    heads, clusters = counts.shape
    index = labels[..., None].expand_as(rows)
    sums = torch.zeros(heads, clusters, rows.shape[-1], device=rows.device)
    return sums.scatter_add_(1, index, rows.float()) / counts.clamp(min=1)[..., None]


def _rows(table: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Rows [H, k, D] of ``table`` [H, C, D] at ``labels`` [H, k]."""
    return table.gather(1, labels[..., None].expand(-1, -1, table.shape[-1]))
