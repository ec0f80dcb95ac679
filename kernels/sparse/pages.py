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

    def block_lists(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What a dense kernel reads in place of a block table and lengths, one row a KV head.

        Returns page numbers int32 [H, most], those of each head in ascending order, padded with 0; how many
        of them count, int32 [H]; and tokens in them, int32 [H]. A partial page comes last or not at all, so
        that a length says how much of it is read.
        """
        counts = self.pages.sum(1)
        numbers = (
            (~self.pages).long().argsort(dim=1, stable=True)[:, : int(counts.max()) if len(counts) else 0]
        )
        used = torch.arange(numbers.shape[1], device=numbers.device) < counts[:, None]
        lengths = self.token_mask().sum(1)
        return torch.where(used, numbers, 0).int(), counts.int(), lengths.int()


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
