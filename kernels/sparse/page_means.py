"""Top-p over pages of which only sizes, means and variances are known: cheap, and what a CPU can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.kernels.sparse.attention import logits, weighted
from penstock.kernels.sparse.clusters import Clusters, log_masses
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.groups import agree
from penstock.kernels.sparse.pages import PageSelection
from penstock.kernels.sparse.selection import Selection, always


@dataclass(frozen=True, slots=True)
class PageMeans:
    """Pages by the mass that their size, mean and variance make likely; the rest through their values' means.

    Keys must be finite. Only full pages are indexed, so that a summary never changes and shared blocks share
    it.
    """

    config: SparseConfig
    page_tokens: int = 16
    name: str = "page means"

    def index(self, keys: torch.Tensor, values: torch.Tensor) -> Clusters:
        """Each full page is a cluster."""
        heads, tokens, _ = keys.shape
        pages = tokens // self.page_tokens
        full = pages * self.page_tokens
        labels = (torch.arange(full, device=keys.device) // self.page_tokens).expand(heads, -1)
        return Clusters.of(keys[:, :full], values[:, :full], labels.contiguous(), pages)

    def select(self, index: Clusters, query: torch.Tensor, keys: torch.Tensor, amount: float) -> Selection:
        """Share of mass: ``amount``, with a calibrated margin in it."""
        heads, tokens, _ = keys.shape
        kept = PageSelection.holding(
            always(self.config, tokens, index.tokens).expand(heads, -1), self.page_tokens
        )
        known = index.sizes.shape[1]
        masses = self._masses(index, query)
        # Pages that are read whatever they hold are weighed by what they do hold.
        exact = logits(query, keys).masked_fill(~kept.token_mask()[:, None], -torch.inf)
        far = masses.masked_fill(kept.pages[:, None, :known], -torch.inf)
        total = torch.logaddexp(exact.logsumexp(-1), far.logsumexp(-1))
        weights = (far - total[..., None]).exp().nan_to_num(0.0)
        short = (amount - (exact.logsumexp(-1) - total).exp()).clamp(min=0)
        chosen = kept.pages.clone()
        chosen[:, :known] |= agree(self.config.group_rule, weights, short) & (weights > 0).any(1)
        left = far.masked_fill(chosen[:, None, :known], -torch.inf)
        rest = weighted(left, index.values) if self.config.estimate_rest else None
        pages = PageSelection(chosen, self.page_tokens, tokens)
        return Selection(pages.token_mask(), torch.zeros(heads, dtype=torch.int64), rest)

    def _masses(self, index: Clusters, query: torch.Tensor) -> torch.Tensor:
        query = query.float()
        products = query @ index.centroids.transpose(1, 2)
        deviations = (query.square().sum(-1, keepdim=True) * index.spreads[:, None]).sqrt()
        return log_masses(products, deviations, index.sizes[:, None])
