"""Which pages a decode step reads, from the logs of their masses, and what that was worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from penstock.kernels.numba_support import HAS_NUMBA
from penstock.kernels.sparse.calibration import LEAST, MOST, needed_margin, with_margin
from penstock.kernels.sparse.config import GroupRule
from penstock.kernels.sparse.groups import agree

MARGINS = tuple(LEAST + (MOST - LEAST) * step / 15 for step in range(16))
"""Margins that a measurement tries."""


def page_shares(log_masses: torch.Tensor) -> torch.Tensor:
    """Shares of the mass [H, G, P] of pages of ``log_masses``; one that is not finite has none."""
    return log_masses.masked_fill(~log_masses.isfinite(), -torch.inf).softmax(-1).nan_to_num(0.0)


def choose_pages(
    rule: GroupRule, shares: torch.Tensor, kept: torch.Tensor, mass: torch.Tensor
) -> torch.Tensor:
    """``kept`` pages (bool [H, P]) and those with which ``shares`` float32 [H, G, P] reach ``mass`` [H] in
    every query head; bool [H, P]."""
    if rule == "ranked" and HAS_NUMBA:
        from penstock.kernels.sparse import fused_choice

        chosen = torch.empty_like(kept)
        arrays = (each.numpy() for each in (shares.contiguous(), kept.contiguous(), mass, chosen))
        fused_choice.choose_ranked(*arrays)
        return chosen
    had = (shares * kept[:, None]).sum(-1)
    free = shares.masked_fill(kept[:, None], 0.0)
    return kept | (agree(rule, free, (mass[:, None] - had).clamp(min=0)) & (free > 0).any(1))


class Weighed(NamedTuple):
    """``shares`` [H, G, P] of pages in the mass, pages that are ``kept`` whatever they weigh, bool [H, P],
    and ``totals`` [H, G], the logs of what the shares are of."""

    shares: torch.Tensor
    kept: torch.Tensor
    totals: torch.Tensor


def weigh(logs: torch.Tensor, always: torch.Tensor) -> Weighed:
    """Shares of the masses with ``logs`` [H, G, P] (float32, contiguous, may be written to).

    Kept are the pages of ``always`` (int64) and those whose mass is not finite, so that NaN shows where dense
    attention shows it.
    """
    kept = torch.zeros(len(logs), logs.shape[2], dtype=torch.bool)
    if HAS_NUMBA:
        from penstock.kernels.sparse import fused_choice

        totals = torch.empty(logs.shape[:2])
        fused_choice.to_shares(logs.numpy(), always.numpy(), kept.numpy(), totals.numpy())
        return Weighed(logs, kept, totals)
    kept[:, always] = True
    totals = logs.masked_fill(~logs.isfinite(), -torch.inf).logsumexp(-1)
    return Weighed(page_shares(logs), kept | ~logs.isfinite().all(1), totals)


def most_massive(shares: torch.Tensor, kept: torch.Tensor, count: int) -> torch.Tensor:
    """``kept`` pages (bool [H, P]) and those with the largest sums over a group, ``count`` in each head if no
    more are kept; bool [H, P]."""
    if HAS_NUMBA:
        from penstock.kernels.sparse import fused_choice

        chosen = torch.empty_like(kept)
        arrays = shares.contiguous().numpy(), kept.contiguous().numpy()
        fused_choice.choose_massive(*arrays, min(count, kept.shape[1]), chosen.numpy())
        return chosen
    sums = shares.sum(1).masked_fill(kept, torch.inf)
    best = sums.topk(min(count, sums.shape[1]), dim=1, sorted=False).indices
    return kept.scatter(1, best, True)


def exact_log_masses(query: torch.Tensor, keys: torch.Tensor, tail: int) -> torch.Tensor:
    """Logs of the sums of exponentials of ``query`` [H, G, D] on pages ``keys`` [H, P, N, D]; [H, G, P].

    Of the last page, the first ``tail`` tokens count.
    """
    heads, pages, tokens, size = keys.shape
    scores = query.float() @ keys.float().reshape(heads, pages * tokens, size).transpose(1, 2)
    paged = scores.unflatten(-1, (pages, tokens))
    paged[..., -1, tail:] = -torch.inf
    return paged.logsumexp(-1)


def measure(
    rule: GroupRule, mass: float, shares: torch.Tensor, exact: torch.Tensor, kept: torch.Tensor
) -> Sequence[float | None]:
    """The margins with which each query head of one KV head attains ``mass``; None where ``kept`` pages have
    it, and any margin would do.

    ``shares`` estimated and ``exact`` ones are [G, P]; ``kept`` is bool [P].
    """
    asked = [with_margin(mass, margin) for margin in MARGINS]
    many = len(asked)
    chosen = choose_pages(rule, shares.expand(many, -1, -1), kept.expand(many, -1), torch.tensor(asked))
    attained = (exact * chosen[:, None]).sum(-1)
    had = (exact * kept).sum(-1).tolist()
    return [
        None if had[head] >= mass else needed_margin(asked, attained[:, head].tolist(), mass)
        for head in range(len(shares))
    ]
