"""What a selector gives back, and what every selector offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from penstock.kernels.sparse.attention import Partial, attend, merge
from penstock.kernels.sparse.config import SparseConfig


@dataclass(frozen=True, slots=True)
class Selection:
    """The tokens that each KV head reads, bool [H, n].

    ``rest`` estimates the attention over the tokens that are not read, where the selector can. ``scored`` [H]
    is how many tokens were looked at one by one to choose them.
    """

    tokens: torch.Tensor
    scored: torch.Tensor
    rest: Partial | None = None

    def attention(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Partial:
        """Attention over the tokens that are read, and the estimate of the others."""
        read = attend(query, keys, values, self.tokens)
        return read if self.rest is None else merge(read, self.rest)


IndexT = TypeVar("IndexT")


class Selector(Protocol[IndexT]):
    """A way to choose tokens. Its index is made once from the keys, and knows nothing of queries."""

    @property
    def name(self) -> str:
        """What tables call it."""

    def index(self, keys: torch.Tensor, values: torch.Tensor) -> IndexT:
        """What is kept of ``keys`` and ``values`` [H, m, D]."""

    def select(self, index: IndexT, query: torch.Tensor, keys: torch.Tensor, amount: float) -> Selection:
        """Choose for ``query`` [H, G, D] among ``keys`` [H, n, D], of which the first ``m`` are in the index.

        ``amount`` in (0, 1] is the share of mass that a query head is to have or, for selectors of a fixed
        budget, the share of the tokens to read.
        """


def always(config: SparseConfig, tokens: int, indexed: int) -> torch.Tensor:
    """Tokens that are read whatever their scores, bool [n]: sinks, recent ones, those that no index has
    yet."""
    position = torch.arange(tokens)
    return (
        (position < config.sink_tokens) | (position >= tokens - config.recent_tokens) | (position >= indexed)
    )
