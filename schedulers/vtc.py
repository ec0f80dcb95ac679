"""Virtual token counter: the client that has had the least is next, in order of arrival inside a client.

"Fairness in Serving Large Language Models" (arXiv 2401.00588), Algorithm 2, with weights.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from penstock.schedulers.accounts import Account, AccountBook, Prices
from penstock.schedulers.ranked import RankedOrder
from penstock.schedulers.standings import Newcomers, Standings
from penstock.schedulers.waiting import Clock


class Counters(Standings):
    """Virtual counters. A client's counter is its lane.

    A client that comes back is lifted to the least counter that waits, or, when nothing waits, to that of the
    client whose request left the queue last: nobody saves up service by staying away. An order does not see
    what runs; a client that only runs keeps its counter, which its running requests go on raising.

    A new name starts at the lift, before all that were served since: a flood of them would starve the rest.
    So while anybody waits there is room for ``newcomers`` only once in a round, in which the least counter
    grows by ``quantum_tokens``: every client that waits is served as much.
    """

    def __init__(self, quantum_tokens: float, newcomers: Newcomers) -> None:
        self._left_last: Account | None = None
        self._quantum_tokens = quantum_tokens
        self._newcomers = newcomers
        self._round_ends = quantum_tokens

    def admits(self, least: float | None, *, known: bool) -> bool:
        return least is None or self._newcomers.may_come(known=known)

    def opened(self, account: Account, least: float | None, *, known: bool) -> None:
        if least is not None:
            self._newcomers.came(known=known)
        self.joins(account, least)

    def reach(self, lane: float) -> None:
        if lane >= self._round_ends:
            self._round_ends = lane + self._quantum_tokens
            self._newcomers.begin_round()

    def set_quantum(self, tokens: float, accounts: Iterable[Account]) -> None:
        self._round_ends += tokens - self._quantum_tokens
        self._quantum_tokens = tokens

    def joins(self, account: Account, least: float | None) -> None:
        account.level = max(account.level, self._lift(least))

    def leaves(self, account: Account) -> None:
        self._left_last = account

    def charge(self, account: Account, service: float) -> None:
        account.level += service / account.weight

    def lane(self, account: Account) -> float:
        return account.level

    def standing(self, account: Account) -> float:
        return account.level

    def may_forget(self, account: Account, least: float | None) -> bool:
        """A new client starts at the lift: forgetting one above it would spare it the difference."""
        return account.level <= self._lift(least)

    def _lift(self, least: float | None) -> float:
        if least is not None:
            return least
        return self._left_last.level if self._left_last is not None else 0.0


class CounterOrder(RankedOrder):
    """VTC. Which tokens of a prompt count is decided by what is passed to ``charge_extend``.

    Args:
        clock: for forgetting.
        extend_weight: service of one token of a prompt.
        output_weight: service of one generated token.
        idle_s: a client that is idle for so long, and not ahead of those that wait, is forgotten.
        max_clients: clients with a counter of their own; more names share one.
        quantum_tokens: by how much the least counter grows in a round, in weighted tokens.
        newcomers_per_refill: new names that get a counter of their own in a round, while anybody waits; more
            share one until a later request. Named as in DLPM, whose rounds are refills.
        listed: clients that always have a counter of their own, and count neither as newcomers nor among
            ``max_clients``.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        extend_weight: float = 1.0,
        output_weight: float = 2.0,
        idle_s: float = 3600.0,
        max_clients: int = 10_000,
        quantum_tokens: float = 2000,
        newcomers_per_refill: int = 8,
        listed: Collection[str] = (),
    ) -> None:
        if not 0 < quantum_tokens < math.inf:
            raise ValueError(f"quantum_tokens is {quantum_tokens}, allowed: more than 0")
        super().__init__(
            standings=Counters(quantum_tokens, Newcomers(newcomers_per_refill)),
            book=AccountBook(
                clock=clock,
                idle_s=idle_s,
                max_clients=max_clients,
                by_prefix=False,
                unnamed_by_prefix=False,
                listed=listed,
            ),
            prices=Prices(extend_weight, output_weight),
        )
