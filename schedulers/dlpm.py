"""Deficit longest prefix match: fair between clients, local inside the quantum.

"Locality-aware Fair Scheduling in LLM Serving" (arXiv 2501.14312), Algorithm 1: of the requests whose client
has a positive deficit the one with the longest cached prefix is next; service is taken off the client's
deficit; when no waiting client has a positive deficit, every client without one gets a quantum, again until
one has.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from penstock.schedulers.accounts import Account, AccountBook, Prices
from penstock.schedulers.output_lengths import OutputLengths
from penstock.schedulers.ranked import RankedOrder
from penstock.schedulers.standings import Newcomers, Standings
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

    def joins(self, account: Account, least: float | None) -> None:
        """Who had nothing waiting keeps no more credit than a quantum."""
        account.ahead = account.expected

    def reweigh(self, account: Account, weight: float) -> None:
        if weight != account.weight:
            self._settle(account)
            account.weight = weight
            account.level = min(account.level, self._quantum(account))

    def set_quantum(self, tokens: float, accounts: Iterable[Account]) -> None:
        """What refills so far gave is settled first; credit never exceeds the new quantum."""
        accounts = list(accounts)
        for account in accounts:
            self._settle(account)
        self._quantum_tokens = tokens
        for account in accounts:
            account.level = min(account.level, self._quantum(account))

    def charge(self, account: Account, service: float) -> None:
        """Take ``service`` off the deficit, except what was charged ahead and is not expected any more.

        A refund may come after refills that its charge had caused: then it would end above the quantum, and
        the quanta that the client would not have got without the charge are taken back.
        """
        if account.ahead > account.expected and service > 0:
            paid = min(service, account.ahead - account.expected)
            account.ahead -= paid
            service -= paid
        self._take(account, service)

    def _take(self, account: Account, service: float) -> None:
        if account.level <= 0 and account.epoch != self.epoch:
            self._settle(account)
        # With a deficit above zero a client is given nothing, so its level is as of any epoch.
        account.epoch = self.epoch
        account.level -= service
        if service < 0 and account.level > (quantum := self._quantum(account)):
            account.level = min(account.level - math.ceil(account.level / quantum - 1) * quantum, quantum)

    def expect(self, account: Account, service: float) -> None:
        """The client's running requests are to cost ``service`` more than was said before; negative: less.

        It is charged ahead, and what turns out too much is given back. Credit never exceeds a quantum: what
        finds no room stays charged and pays for the client's next service.
        """
        account.expected = max(0.0, account.expected + service)
        if account.expected > account.ahead:
            missing, account.ahead = account.expected - account.ahead, account.expected
            self._take(account, missing)
        elif account.expected < account.ahead:
            self._settle(account)
            level = min(account.level + account.ahead - account.expected, self._quantum(account))
            account.ahead -= level - account.level
            account.level = level

    def lane(self, account: Account) -> int:
        return max(self.epoch, account.epoch + self._refills_needed(account))

    def moves_all(self, lane: float) -> bool:
        return lane > self.epoch

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
    """DLPM. A client's deficit is charged for the output that its running requests are expected to generate
    when they are admitted, and put right as it comes (so does VTC with length prediction, arXiv 2401.00588):
    else a client with short prompts fills the batch before its first token is charged. The mean of its ended
    requests is expected; what a client is shown to have had is what was generated.

    Every deficit stays in ``(-U, quantum_tokens * weight]``, where U is the service that a client
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
        first_output_tokens: what a request is expected to generate before any has ended; 0 charges output
            only as it comes, as Algorithm 1 does.
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
        first_output_tokens: float = 128.0,
        newcomers_per_refill: int = 8,
        listed: Collection[str] = (),
        unnamed_by_arrival: bool = True,
    ) -> None:
        if not 0 < quantum_tokens < math.inf:
            raise ValueError(f"quantum_tokens is {quantum_tokens}, allowed: more than 0")
        if not 0 <= first_output_tokens < math.inf:
            raise ValueError(f"first_output_tokens is {first_output_tokens}, allowed: 0 or more")
        self._lengths = OutputLengths(first_output_tokens) if first_output_tokens else None
        self._deficits = Deficits(quantum_tokens, Newcomers(newcomers_per_refill))
        super().__init__(
            standings=self._deficits,
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

    def reserve_output(self, client: str, generated: int, at_most: int) -> int:
        account = self._settled(client)
        # Requests of the shared account may move to one of their own while they run.
        if self._lengths is None or account is self._book.shared:
            return 0
        tokens = max(0, min(self._lengths.expected(account.outputs) - generated, at_most))
        self._expect(account, tokens)
        return tokens

    def release_output(self, client: str, tokens: int) -> None:
        self._expect(self._settled(client), -tokens)

    def charge_output(self, client: str, tokens: int, expected: int = 0) -> None:
        account = self._book.find(client)
        account.expected = max(0.0, account.expected - self._prices.output * expected)
        self._charge_output(account, tokens)

    def observe_output(self, client: str, tokens: int) -> None:
        if self._lengths is not None:
            account = self._book.find(client)
            account.outputs = self._lengths.observe(account.outputs, tokens)

    def _expect(self, account: Account, tokens: int) -> None:
        """The deficit changes as by a charge, and a client that is given something back may go first."""
        self._deficits.expect(account, self._prices.output * tokens)
        if tokens < 0 and account.rank is not None:
            self._seat(account)
