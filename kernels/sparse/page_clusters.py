"""Clusters of keys within each page: a summary that belongs to the page alone, whoever shares it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.kernels.sparse.clusters import log_masses


@dataclass(frozen=True, slots=True)
class PageClusters:
    """``S`` clusters in each of ``P`` pages: ``means`` [H, P, S, D], ``sizes`` and ``spreads`` float32
    [H, P, S], the latter the mean square of a channel's distance to the mean."""

    means: torch.Tensor
    sizes: torch.Tensor
    spreads: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, clusters: int, rounds: int) -> PageClusters:
        """Clusters of full pages ``keys`` [H, P, N, D], by k-means that starts from runs of positions.

        Runs are what neighbouring tokens have in common; the rounds gather what stands apart in a page, and
        the spread never grows with them. A cluster that loses all tokens stays empty, of size 0.
        """
        heads, pages, tokens, _ = keys.shape
        keys = keys.float()
        runs = torch.arange(tokens, device=keys.device) * clusters // tokens
        labels = runs.expand(heads, pages, tokens)
        for _ in range(rounds):
            means = _means(keys, _members(labels, clusters))
            # |k - c|^2 without |k|^2, which all clusters have in common.
            gaps = means.square().sum(-1)[..., None, :] - 2 * keys @ means.transpose(-1, -2)
            labels = gaps.argmin(-1)
        members = _members(labels, clusters)
        means = _means(keys, members)
        squares = members.transpose(-1, -2) @ keys.square().sum(-1, keepdim=True)
        sizes = members.sum(-2)
        mean_squares = squares[..., 0] / sizes.clamp(min=1)
        spreads = (mean_squares - means.square().sum(-1)).clamp(min=0) / keys.shape[-1]
        return cls(means, sizes, spreads)

    def log_page_masses(self, query: torch.Tensor) -> torch.Tensor:
        """Logs of the estimated sums of exponentials of each page for ``query`` [H, G, D]; [H, G, P].

        Not finite where a key or the query is not.
        """
        products = torch.bmm(query, self.means.flatten(1, 2).transpose(1, 2))
        return log_page_masses(query, products, self.sizes, self.spreads)


def log_page_masses(
    query: torch.Tensor, products: torch.Tensor, sizes: torch.Tensor, spreads: torch.Tensor
) -> torch.Tensor:
    """``PageClusters.log_page_masses`` from the ``products`` [H, G, P * S] of query and means."""
    heads, pages, clusters = sizes.shape
    # One length for a group: deviations are then a term of the cluster, not of every pair with a query head.
    lengths = query.square().sum(-1).mean(1)[:, None, None]
    deviations = (lengths * spreads.reshape(heads, 1, -1)).sqrt()
    masses = log_masses(products, deviations, sizes.reshape(heads, 1, -1))
    return masses.unflatten(-1, (pages, clusters)).logsumexp(-1)


def _members(labels: torch.Tensor, clusters: int) -> torch.Tensor:
    """Whether a token [..., N] is in a cluster: float32 [..., N, S]."""
    return (labels[..., None] == torch.arange(clusters, device=labels.device)).float()


def _means(keys: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    sizes = members.sum(-2).clamp(min=1)[..., None]
    return members.transpose(-1, -2) @ keys / sizes
