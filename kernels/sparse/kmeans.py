"""k-means over keys, all KV heads at once, the same on every run."""

from __future__ import annotations

import torch


def assign(keys: torch.Tensor, clusters: int, iterations: int, seed: int) -> torch.Tensor:
    """The cluster of each of ``keys`` [H, n, D]: int64 [H, n], below ``clusters``; clusters may be empty.

    Starts from keys drawn at random and stops when nothing moves (as in Tactic). An empty cluster
    keeps its centroid, so that it may win keys later. Keys are finite.
    """
    heads, tokens, size = keys.shape
    if tokens == 0:
        return torch.zeros(heads, 0, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(tokens, generator=generator)[:clusters].to(keys.device)
    keys = keys.float()
    centroids = keys[:, first]
    owner = nearest(keys, centroids)
    for _ in range(iterations - 1):
        sums = torch.zeros_like(centroids).scatter_add_(1, owner[..., None].expand(-1, -1, size), keys)
        counts = torch.zeros(heads, centroids.shape[1], device=keys.device)
        counts.scatter_add_(1, owner, torch.ones_like(owner, dtype=torch.float32))
        centroids = torch.where(counts[..., None] > 0, sums / counts.clamp(min=1)[..., None], centroids)
        before, owner = owner, nearest(keys, centroids)
        if torch.equal(before, owner):
            break
    return owner


def nearest(keys: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The nearest of ``centroids`` [H, C, D] to ``keys`` [H, n, D]: int64 [H, n]; the first of equals."""
    # |k - c|^2 without |k|^2, which is the same for every centroid.
    offsets = (centroids * centroids).sum(-1)[:, :, None]
    return torch.baddbmm(offsets, centroids, keys.transpose(1, 2), alpha=-2).argmin(1)
