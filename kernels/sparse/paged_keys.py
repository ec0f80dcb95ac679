"""What sparse attention asks of an engine's KV cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from penstock.kernels.sparse.page_choice import exact_log_masses


class Keys(ABC):
    """Keys of a layer's KV cache, whatever their order in memory, and values where these can be read."""

    @abstractmethod
    def read(self, blocks: torch.Tensor, heads: slice = slice(None)) -> torch.Tensor:
        """Keys [H, P, N, D] of ``blocks`` (int64 [P]) and of ``heads``; slots that were never written hold
        anything."""

    def read_values(self, blocks: torch.Tensor) -> torch.Tensor | None:
        """Values [H, P, N, V] of ``blocks``, as ``read`` has their keys; None where nobody can say where they
        are."""
        return None

    def log_masses(
        self,
        query: torch.Tensor,
        blocks: torch.Tensor,
        pages: torch.Tensor,
        tail: int,
        logs: torch.Tensor,
        heads: slice = slice(None),
    ) -> None:
        """Write the logs of the sums of exponentials of ``query`` float32 [H, G, D] on ``pages`` (int64 [K])
        of ``blocks`` (int64 [P]) to ``logs`` float32 [H, G, P].

        ``query`` and ``logs`` are of ``heads`` alone. The last of ``pages`` is the request's last, and of it
        the first ``tail`` tokens count.
        """
        logs[..., pages] = exact_log_masses(query, self.read(blocks[pages], heads), tail)
