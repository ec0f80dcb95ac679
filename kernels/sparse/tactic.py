"""Tactic as its paper has it: clusters in the order of their scores, a fitted curve says where to stop."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.kernels.sparse.attention import logits
from penstock.kernels.sparse.clusters import Clusters, by_kmeans
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.selection import Selection, always


@dataclass(frozen=True, slots=True)
class Tactic:
    """k-means, an exact head, ``y = a / x + b`` through two windows (arXiv 2502.12216).

    The paper does not say what happens where the curve is below zero, which it often is: it is cut there.
    """

    config: SparseConfig
    head_share: float = 0.02
    windows: tuple[float, float] = (0.1, 0.6)
    window_share: float = 0.005
    name: str = "tactic"

    def index(self, keys: torch.Tensor, values: torch.Tensor) -> Clusters:
        """Clusters over the whole sequence."""
        config = self.config
        return by_kmeans(keys, values, config.cluster_tokens, config.kmeans_iterations, config.seed)

    def select(self, index: Clusters, query: torch.Tensor, keys: torch.Tensor, amount: float) -> Selection:
        """Share of mass: ``amount``. Each query head by itself, then their union."""
        heads, tokens, _ = keys.shape
        kept = always(self.config, tokens, index.tokens).expand(heads, -1)
        if index.tokens == 0:
            return Selection(kept, torch.zeros(heads, dtype=torch.int64))
        places = self._places(index, query)
        exact = logits(query, keys)
        clustered = exact[..., : index.tokens].gather(2, places)
        tail = exact[..., index.tokens :]
        peak = exact.amax(-1, keepdim=True)
        curve = self._curve((clustered - peak).exp())
        rest = (tail - peak).exp().sum(-1, keepdim=True)
        needed = curve.cumsum(-1) - curve < amount * (curve.sum(-1, keepdim=True) + rest) - rest
        chosen = torch.zeros_like(exact[..., : index.tokens], dtype=torch.bool).scatter_(2, places, needed)
        padded = torch.nn.functional.pad(chosen.any(1), (0, tokens - index.tokens))
        head, width = self._head(index.tokens), self._width(index.tokens)
        scored = torch.full((heads,), min(index.tokens, head + 2 * width))
        return Selection(padded | kept, scored)

    def _places(self, index: Clusters, query: torch.Tensor) -> torch.Tensor:
        """Tokens [H, G, m] cluster by cluster, those of the cluster with the largest product first."""
        products = query.float() @ index.centroids.transpose(1, 2)
        rank = products.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        group = query.shape[1]
        ranks = rank.gather(2, index.owner[:, None].expand(-1, group, -1))
        return index.order[:, None].expand(-1, group, -1).gather(2, ranks.argsort(dim=-1, stable=True))

    def _curve(self, weights: torch.Tensor) -> torch.Tensor:
        """Estimates of ``weights`` [H, G, m]: exact at the head of the order, the fitted curve after it."""
        tokens = weights.shape[-1]
        width = self._width(tokens)
        starts = [min(int(share * tokens), tokens - width) for share in self.windows]
        first, second = (weights[..., start : start + width].mean(-1, keepdim=True) for start in starts)
        x1, x2 = (start + (width + 1) / 2 for start in starts)
        a = (first - second) / (1 / x1 - 1 / x2) if x1 != x2 else torch.zeros_like(first)
        b = first - a / x1
        x = torch.arange(1, tokens + 1)
        return torch.where(x <= self._head(tokens), weights, (a / x + b).clamp(min=0))

    def _head(self, tokens: int) -> int:
        return max(1, round(self.head_share * tokens))

    def _width(self, tokens: int) -> int:
        return max(1, round(self.window_share * tokens))
