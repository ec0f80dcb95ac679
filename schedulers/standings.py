"""What a policy knows of its clients: who goes first, and what service does to that."""

from __future__ import annotations

from collections.abc import Iterable

from penstock.schedulers.accounts import Account


class Newcomers:
    """Bounds how many accounts new names get a round, and as many again those with requests waiting, so that
    inventing names does not keep a regular client out.

    Raises:
        ValueError: ``per_round`` is negative.
    """

    def __init__(self, per_round: int) -> None:
        if per_round < 0:
            raise ValueError(f"newcomers_per_refill is {per_round}, allowed: 0 or more")
        self._per_round = per_round
        self._came = {True: 0, False: 0}

    def may_come(self, *, known: bool) -> bool:
        """Whether there is room for one more."""
        return self._came[known] < self._per_round

    def came(self, *, known: bool) -> None:
        """One has an account."""
        self._came[known] += 1

    def begin_round(self) -> None:
        """There is room for as many again."""
        self._came = {True: 0, False: 0}


class Standings:
    """What a policy knows of its clients. This one treats all alike: the order is that of the requests."""

    def admits(self, least: float | None, *, known: bool) -> bool:
        """Whether a new name, or one ``known`` by requests that wait, may have an account of its own now;
        ``least`` is the first lane, None if nobody waits."""
        return True

    def opened(self, account: Account, least: float | None, *, known: bool) -> None:
        """A name that was admitted has an account."""

    def joins(self, account: Account, least: float | None) -> None:
        """A new request comes for a client that has none waiting."""

    def leaves(self, account: Account) -> None:
        """A client's last request left the queue."""

    def reweigh(self, account: Account, weight: float) -> None:
        """A client's share changes."""
        account.weight = weight

    def charge(self, account: Account, service: float) -> None:
        """A client had ``service`` weighted tokens."""

    def lane(self, account: Account) -> float:
        """Which clients go first: those of the lowest lane."""
        return 0

    def moves_all(self, lane: float) -> bool:
        """Whether ``reach`` changes how other clients stand, by what they have been charged until then."""
        return False

    def reach(self, lane: float) -> None:
        """A client of this lane is served."""

    def standing(self, account: Account) -> float:
        """What ``ClientService.standing`` shows."""
        return 0.0

    def set_quantum(self, tokens: float, accounts: Iterable[Account]) -> None:
        """A quantum has so many weighted tokens from now on."""

    def may_forget(self, account: Account, least: float | None) -> bool:
        """Whether an idle client would gain nothing by coming back as a new one."""
        return True
