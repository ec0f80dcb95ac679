"""Virtual token counter: the client that has had the least is next, in order of arrival inside a client.

"Fairness in Serving Large Language Models" (arXiv 2401.00588), Algorithm 2, with weights.
"""

from __future__ import annotations

from penstock.schedulers.accounts import Account, AccountBook, Prices
from penstock.schedulers.ranked import RankedOrder, Standings
from penstock.schedulers.waiting import Clock


class Counters(Standings):
    """Virtual counters. A client's counter is its lane.

    A client that comes back is lifted to the least counter that waits, or, when nothing waits, to that of the
    client whose request left the queue last: nobody saves up service by staying away. An order does not see
    what runs; a client that only runs keeps its counter, which its running requests go on raising.
    """

    def __init__(self) -> None:
        self._left_last: Account | None = None

    def opened(self, account: Account, least: float | None, *, known: bool) -> None:
        self.joins(account, least)

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
    """

    def __init__(
        self,
        *,
        clock: Clock,
        extend_weight: float = 1.0,
        output_weight: float = 2.0,
        idle_s: float = 3600.0,
        max_clients: int = 10_000,
    ) -> None:
        super().__init__(
            standings=Counters(),
            book=AccountBook(
                clock=clock, idle_s=idle_s, max_clients=max_clients, by_prefix=False, unnamed_by_prefix=False
            ),
            prices=Prices(extend_weight, output_weight),
        )
