"""Selection of whole pages, which is what a block table can say."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.groups import agree


@dataclass(frozen=True, slots=True)
class PageSelection:
    """The pages of ``page_tokens`` that each KV head reads of a request of ``tokens``: bool [H, pages]."""

    pages: torch.Tensor
    page_tokens: int
    tokens: int

    @classmethod
    def holding(cls, tokens: torch.Tensor, page_tokens: int) -> PageSelection:
        """The pages with any of ``tokens`` (bool [H, n])."""
        return cls(_paged(tokens, page_tokens).any(-1), page_tokens, tokens.shape[1])

    def token_mask(self) -> torch.Tensor:
        """The tokens of the pages, bool [H, n]."""
        return self.pages.repeat_interleave(self.page_tokens, 1)[:, : self.tokens]


def choose(
    config: SparseConfig,
    weights: torch.Tensor,
    kept: torch.Tensor,
    mass: torch.Tensor,
    *,
    page_tokens: int = 1,
) -> torch.Tensor:
    """``kept`` tokens (bool [H, n]) and those that are needed beside them; bool [H, n].

    ``weights`` [H, G, n] are estimated shares of the mass, 0 where nothing is known, which is never chosen
    for itself; ``mass`` [H, G] is the share to reach. With ``page_tokens`` above 1, whole pages are chosen.
    """
    if page_tokens > 1:
        pages = PageSelection.holding(kept, page_tokens).pages
        sums = _paged(weights, page_tokens).sum(-1)
        chosen = choose(config, sums, pages, mass)
        return PageSelection(chosen, page_tokens, kept.shape[1]).token_mask()
    had = (weights * kept[:, None]).sum(-1)
    free = weights.masked_fill(kept[:, None], 0.0)
    return kept | (agree(config.group_rule, free, (mass - had).clamp(min=0)) & (free > 0).any(1))


def _paged(rows: torch.Tensor, page_tokens: int) -> torch.Tensor:
    """``rows`` [..., n] as [..., pages, page_tokens], the end filled with zeros."""
    pages = math.ceil(rows.shape[-1] / page_tokens)
    padded = torch.nn.functional.pad(rows, (0, pages * page_tokens - rows.shape[-1]))
    return padded.unflatten(-1, (pages, page_tokens))
