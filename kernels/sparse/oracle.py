"""The fewest tokens that have the mass, by exact scores: what no selector can beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from penstock.kernels.sparse.attention import logits
from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.pages import choose
from penstock.kernels.sparse.selection import Selection, always


@dataclass(frozen=True, slots=True)
class Oracle:
    """Exact top-p. It reads the tokens that are always read as every selector does."""

    config: SparseConfig
    name: str = "oracle"
    page_tokens: int = 1
    """Tokens that are read together, by position."""

    def index(self, keys: torch.Tensor, values: torch.Tensor) -> int:
        """Nothing but the number of tokens."""
        return keys.shape[1]

    def select(self, index: int, query: torch.Tensor, keys: torch.Tensor, amount: float) -> Selection:
        """Share of mass: ``amount``."""
        heads, tokens, _ = keys.shape
        weights = logits(query, keys).softmax(-1)
        kept = always(self.config, tokens, index).expand(heads, -1)
        mass = torch.full(query.shape[:2], amount)
        chosen = choose(self.config, weights, kept, mass, page_tokens=self.page_tokens)
        return Selection(chosen, torch.full((heads,), tokens))
