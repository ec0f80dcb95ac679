"""Deficit longest prefix match: fair between clients, local inside the quantum.

"Locality-aware Fair Scheduling in LLM Serving" (arXiv 2501.14312), Algorithm 1: of the requests whose client
has a positive deficit the one with the longest cached prefix is next; service is taken off the client's
deficit; when no waiting client has a positive deficit, every client without one gets a quantum, again until
one has.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from penstock.schedulers.accounts import Account, AccountBook, Prices
from penstock.schedulers.ranked import Newcomers, RankedOrder, Standings
from penstock.schedulers.waiting import Clock, HitTokens


class Deficits(Standings):
    """Deficits of clients, refilled without visiting them.

    Refills are counted by ``epoch``. An account stores its deficit as of the epoch in which it last changed.
    A refill gives ``quantum_tokens * weight`` to those at or below zero only, so at any later epoch the
    account has had that many, but no more than it takes to become positive: a function of the epoch. The
    epoch from which on a client may be served is known as soon as its deficit is, and is its lane. Clients in
    lanes up to the current epoch may be served; if the lowest lane lies beyond it, nobody may, and the
    refills up to there happen at once.

    Args:
        quantum_tokens: what a refill gives at weight 1, in weighted tokens.
        newcomers: accounts that may be opened between two refills.
    """

    def __init__(self, quantum_tokens: float, newcomers: Newcomers) -> None:
        self.epoch = 0
        self._quantum_tokens = quantum_tokens
        self._newcomers = newcomers

    def admits(self, least: float | None, *, known: bool) -> bool:
        return self._newcomers.may_come(known=known)

    def opened(self, account: Account, least: float | None, *, known: bool) -> None:
        self._newcomers.came(known=known)
        account.level, account.epoch = 0.0, self.epoch

    def reweigh(self, account: Account, weight: float) -> None:
        if weight != account.weight:
            self._settle(account)
            account.weight = weight
            account.level = min(account.level, self._quantum(account))

    def charge(self, account: Account, service: float) -> None:
        """Take ``service`` off the deficit.

        A refund may come after refills that its charge had caused: then it would end above the quantum, and
        the quanta that the client would not have got without the charge are taken back.
        """
        if account.level <= 0 and account.epoch != self.epoch:
            self._settle(account)
        # With a deficit above zero a client is given nothing, so its level is as of any epoch.
        account.epoch = self.epoch
        account.level -= service
        if service < 0 and account.level > (quantum := self._quantum(account)):
            account.level = min(account.level - math.ceil(account.level / quantum - 1) * quantum, quantum)

    def lane(self, account: Account) -> int:
        return max(self.epoch, account.epoch + self._refills_needed(account))

    def reach(self, lane: float) -> None:
        if lane > self.epoch:
            self.epoch = int(lane)
            self._newcomers.begin_round()

    def standing(self, account: Account) -> float:
        refills = min(self.epoch - account.epoch, self._refills_needed(account))
        quantum = self._quantum(account)
        return min(account.level + refills * quantum, quantum)

    def may_forget(self, account: Account, least: float | None) -> bool:
        """A new client starts at zero: forgetting may cost a client its credit, never spare it a debt."""
        return self.standing(account) >= 0

    def _settle(self, account: Account) -> None:
        account.level, account.epoch = self.standing(account), self.epoch

    def _quantum(self, account: Account) -> float:
        return self._quantum_tokens * account.weight

    def _refills_needed(self, account: Account) -> int:
        """The least number of refills that makes the deficit positive."""
        level, quantum = account.level, self._quantum(account)
        if level > 0:
            return 0
        refills = math.floor(-level / quantum) + 1
        # A quotient that was rounded may be one off.
        if level + refills * quantum <= 0:
            return refills + 1
        if refills > 1 and level + (refills - 1) * quantum > 0:
            return refills - 1
        return refills


class DeficitOrder(RankedOrder):
    """DLPM. Every deficit stays in ``(-U, quantum_tokens * weight]``, where U is the service that a client
    may get between two picks: the tokens of its running requests in the paper (section 4).

    Args:
        clock: for forgetting.
        hit_tokens: cached prefix of a waiting request, in tokens.
        quantum_tokens: weighted tokens that a refill gives a client of weight 1. Larger is more local,
            smaller is fairer over short times.
        extend_weight: service of one computed prompt token.
        output_weight: service of one generated token.
        ageing_tokens_per_s: cached tokens that a second of waiting outweighs. A client's request is
            overtaken only by those that arrive at most (longest hit / ageing) seconds after it.
        refreshes_per_step: prefix hits that ``begin_step`` looks up at most.
        idle_s: a client with nothing waiting, no service for so long and no debt is forgotten.
        max_clients: clients with a deficit of their own; more names share one.
        newcomers_per_refill: new names that get a deficit of their own between two refills; more share one
            until a later request. So whoever invents a name for every request gets the share of so many
            clients and one more.
        listed: clients that always have a deficit of their own, and count neither as newcomers nor among
            ``max_clients``.
        unnamed_by_arrival: requests without a client are served among themselves as the engine would.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        hit_tokens: HitTokens,
        quantum_tokens: float = 2000,
        extend_weight: float = 1.0,
        output_weight: float = 2.0,
        ageing_tokens_per_s: float = 20.0,
        refreshes_per_step: int = 64,
        idle_s: float = 3600.0,
        max_clients: int = 10_000,
        newcomers_per_refill: int = 8,
        listed: Collection[str] = (),
        unnamed_by_arrival: bool = True,
    ) -> None:
        if not 0 < quantum_tokens < math.inf:
            raise ValueError(f"quantum_tokens is {quantum_tokens}, allowed: more than 0")
        super().__init__(
            standings=Deficits(quantum_tokens, Newcomers(newcomers_per_refill)),
            book=AccountBook(
                clock=clock,
                idle_s=idle_s,
                max_clients=max_clients,
                by_prefix=True,
                unnamed_by_prefix=not unnamed_by_arrival,
                listed=listed,
            ),
            prices=Prices(extend_weight, output_weight),
            hit_tokens=hit_tokens,
            ageing_tokens_per_s=ageing_tokens_per_s,
            refreshes_per_step=refreshes_per_step,
        )
