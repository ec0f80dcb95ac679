"""Select, then prune: Quest proposes pages, 4-bit keys choose among their tokens (as in Twilight)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.kernels.sparse.attention import logits
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.quest import Quest, QuestIndex
from penstock.kernels.sparse.selection import Selection, always
from penstock.kernels.sparse.top_p import top_p


@dataclass(frozen=True, slots=True)
class PrunerIndex:
    """Quest's bounds, and the keys as their 4-bit copies restore them, [H, m, D]."""

    pages: QuestIndex
    keys: torch.Tensor


@dataclass(frozen=True, slots=True)
class Pruner:
    """Top-p over the proposed tokens alone, each query head by itself, then their union."""

    config: SparseConfig
    proposed_share: float = 0.25
    page_tokens: int = 16
    name: str = "pruner"

    @property
    def _base(self) -> Quest:
        return Quest(self.config, self.page_tokens)

    def index(self, keys: torch.Tensor, values: torch.Tensor) -> PrunerIndex:
        """Bounds of pages and 4-bit keys, each with a scale and a lowest value of its own."""
        return PrunerIndex(self._base.index(keys, values), _four_bits(keys.float()))

    def select(self, index: PrunerIndex, query: torch.Tensor, keys: torch.Tensor, amount: float) -> Selection:
        """Share of mass: ``amount``, of the mass of the proposed tokens."""
        tokens = keys.shape[1]
        proposed = self._base.select(index.pages, query, keys, self.proposed_share).tokens
        known = torch.cat([index.keys, keys[:, index.pages.tokens :].float()], 1)
        scores = logits(query, known).masked_fill(~proposed[:, None], -torch.inf)
        chosen = top_p(scores.softmax(-1), torch.full(query.shape[:2], amount)).any(1)
        return Selection(chosen | always(self.config, tokens, index.pages.tokens), proposed.sum(-1))


def _four_bits(keys: torch.Tensor) -> torch.Tensor:
    """``keys`` rounded to sixteen levels between the smallest and the largest channel of each."""
    low, high = keys.aminmax(dim=-1, keepdim=True)
    step = ((high - low) / 15).clamp(min=1e-30)
    return ((keys - low) / step).round() * step + low
