"""Longest prefix match: the request with the longest cached prefix first, whoever asks."""

from __future__ import annotations

from penstock.schedulers.accounts import AccountBook, Prices
from penstock.schedulers.ranked import RankedOrder
from penstock.schedulers.standings import Standings
from penstock.schedulers.waiting import Clock, HitTokens


class PrefixOrder(RankedOrder):
    """LPM with ageing. Clients matter to the bookkeeping alone, and to a preempted request, which goes before
    its client's others.

    Args:
        clock: for forgetting.
        hit_tokens: cached prefix of a waiting request, in tokens.
        extend_weight: service of one computed prompt token.
        output_weight: service of one generated token.
        ageing_tokens_per_s: cached tokens that a second of waiting outweighs; 0 is pure LPM, under which a
            cold prompt waits as long as hits keep coming.
        refreshes_per_step: prefix hits that ``begin_step`` looks up at most.
        idle_s: a client that is idle for so long is forgotten.
        max_clients: clients that are told apart.
        unnamed_by_arrival: requests without a client are served among themselves as the engine would.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        hit_tokens: HitTokens,
        extend_weight: float = 1.0,
        output_weight: float = 2.0,
        ageing_tokens_per_s: float = 20.0,
        refreshes_per_step: int = 64,
        idle_s: float = 3600.0,
        max_clients: int = 10_000,
        unnamed_by_arrival: bool = True,
    ) -> None:
        super().__init__(
            standings=Standings(),
            book=AccountBook(
                clock=clock,
                idle_s=idle_s,
                max_clients=max_clients,
                by_prefix=True,
                unnamed_by_prefix=not unnamed_by_arrival,
            ),
            prices=Prices(extend_weight, output_weight),
            hit_tokens=hit_tokens,
            ageing_tokens_per_s=ageing_tokens_per_s,
            refreshes_per_step=refreshes_per_step,
        )
