"""Quest: pages by an upper bound of their scores, a fixed number of them (Tang et al., ICML 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from penstock.kernels.sparse.config import SparseConfig
from penstock.kernels.sparse.selection import Selection, always


@dataclass(frozen=True, slots=True)
class QuestIndex:
    """The smallest and the largest value of each channel in each page, [H, pages, D], and the tokens."""

    low: torch.Tensor
    high: torch.Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Quest:
    """Top-k pages by the largest score that a key within the page's bounds could have.

    The paper has one query head a KV head. For a group, a page counts as much as its best head says, after
    each head's bounds are put on one scale by a softmax over pages.
    """

    config: SparseConfig
    page_tokens: int = 16
    name: str = "quest"

    def index(self, keys: torch.Tensor, values: torch.Tensor) -> QuestIndex:
        """Bounds of each page; those of a last, partial page are of the tokens it has."""
        heads, tokens, size = keys.shape
        pages = math.ceil(tokens / self.page_tokens)
        page = (torch.arange(tokens) // self.page_tokens)[None, :, None].expand(heads, -1, size)
        low, high = (torch.zeros(heads, pages, size) for _ in range(2))
        low.scatter_reduce_(1, page, keys.float(), "amin", include_self=False)
        high.scatter_reduce_(1, page, keys.float(), "amax", include_self=False)
        return QuestIndex(low, high, tokens)

    def bounds(self, index: QuestIndex, query: torch.Tensor) -> torch.Tensor:
        """Upper bounds of the scores in each page, [H, G, pages]."""
        query = query.float()
        return query.clamp(min=0) @ index.high.transpose(1, 2) + query.clamp(max=0) @ index.low.transpose(
            1, 2
        )

    def select(self, index: QuestIndex, query: torch.Tensor, keys: torch.Tensor, amount: float) -> Selection:
        """Share of the tokens: ``amount``, those that are always read included."""
        heads, tokens, _ = keys.shape
        kept = always(self.config, tokens, index.tokens)
        pages = index.low.shape[1]
        room = max(0, round((amount * tokens - int(kept.sum())) / self.page_tokens))
        chosen = torch.zeros(heads, pages, dtype=torch.bool)
        if pages and room:
            best = self.bounds(index, query).softmax(-1).amax(1)
            chosen.scatter_(1, best.topk(min(room, pages), -1).indices, True)
        spread = chosen.repeat_interleave(self.page_tokens, 1)[:, : index.tokens]
        tail = torch.zeros(heads, tokens - index.tokens, dtype=torch.bool)
        return Selection(torch.cat([spread, tail], 1) | kept, torch.zeros(heads, dtype=torch.int64))
