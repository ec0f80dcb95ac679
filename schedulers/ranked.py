"""The waiting order behind DLPM, VTC and LPM: clients ranked by lane, and in a lane by their first request.

What tells the policies apart is the *lane* of a client, a number that its service moves: the refill at which
it may be served (DLPM), its virtual counter (VTC), or nothing (LPM). Each client that waits has one rank

    (lane, -score of its head, arrival of its head)

in one sorted list, so a pick is the list's first, and whatever happens to a client moves one rank: O(log n).
A charge moves none: service only makes lanes higher, so a rank that was not moved stands too far in front, if
it stands wrong, and is moved when it comes first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from sortedcontainers import SortedList

from penstock.schedulers.accounts import OTHERS, Account, AccountBook, Prices
from penstock.schedulers.client_queue import Entry
from penstock.schedulers.prefix_hits import LookUps
from penstock.schedulers.standings import Standings
from penstock.schedulers.waiting import AsItComes, ClientService, HitTokens, Job, Settle

RECHECKS = 8
"""Hits that one pick looks up at most."""
REFRESH_S = 20e-6
"""Time for the look-ups of a step, in the mean: what one takes beyond it is taken off that of the next"""
REPAID_STEPS = 4
"""steps, so many at most: a look-up may have been interrupted."""
FORGET_STEPS = 16
"""Idle accounts are looked for once in so many steps."""

LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1e6


def _nothing_is_due(_client: str | None) -> bool:
    return False


class RankedOrder(AsItComes):
    """A ``WaitingOrder`` over the ``standings`` of a policy.

    Args:
        standings: the policy.
        book: the clients' accounts.
        prices: weights of extend and output tokens.
        hit_tokens: the prefix hit of a waiting request; None orders by arrival alone.
        ageing_tokens_per_s: cached tokens that a second of waiting is worth. All age at one rate, so waiting
            never changes the order of two requests, and a score needs no refreshing.
        refreshes_per_step: hits that ``begin_step`` looks up at most.
        refresh_s: how long it may take over them in the mean, on the clock of ``book``. A virtual clock that
            stands still sets no bound.
    """

    def __init__(
        self,
        *,
        standings: Standings,
        book: AccountBook,
        prices: Prices,
        hit_tokens: HitTokens | None = None,
        ageing_tokens_per_s: float = 0.0,
        refreshes_per_step: int = 0,
        refresh_s: float = REFRESH_S,
    ) -> None:
        if not 0 <= ageing_tokens_per_s < math.inf:
            raise ValueError(f"ageing_tokens_per_s is {ageing_tokens_per_s}, allowed: 0 or more")
        if refreshes_per_step < 0:
            raise ValueError(f"refreshes_per_step is {refreshes_per_step}, allowed: 0 or more")
        self._standings = standings
        self._book = book
        self._prices = prices
        self._hit_tokens = hit_tokens
        self._ageing = ageing_tokens_per_s
        self._look_ups = LookUps(refreshes_per_step)
        self._refresh_s = refresh_s
        self._overspent_s = 0.0
        self._entries: dict[str, Entry] = {}
        self._ranks = SortedList()
        self._chosen: Entry | None = None
        self._step = 0
        self._arrivals = 0
        self._returns = 0
        # Estimates of what was popped in this step, for requests that are put back.
        self._popped: dict[str, tuple[int, int]] = {}
        # Waiting requests on the shared account, by the name they bear.
        self._guests: dict[str, dict[str, Entry]] = {}
        self._settle: Settle = _nothing_is_due

    def add(self, job: Job) -> None:
        self._check(job)
        account = self._account(job.client)
        if not account.queue:
            self._standings.joins(account, self._least())
        self._arrivals += 1
        self._enter(Entry(job, account, self._arrivals))

    def put_back(self, job: Job, *, preempted: bool) -> None:
        self._check(job)
        account = self._account(job.client)
        self._returns -= 1
        entry = Entry(job, account, self._returns, preempted=preempted)
        entry.hit, entry.looked = self._popped.get(job.request_id, (0, entry.looked))
        self._enter(entry)

    def remove(self, request_id: str) -> Job:
        entry = self._entries[request_id]
        self._take(entry)
        return entry.job

    def peek(self) -> Job:
        return self._choose().job

    def pop(self) -> Job:
        entry = self._choose()
        self._take(entry)
        self._popped[entry.job.request_id] = (entry.hit, entry.looked)
        self._look_ups.served(entry)
        return entry.job

    def begin_step(self) -> None:
        self._step += 1
        self._chosen = None
        self._popped.clear()
        if self._step % FORGET_STEPS == 1:
            self._book.forget_idle(self._may_forget)
        if self._hits_matter():
            self._refresh()
            if self._book.unnamed.queue:
                self._look_up_head(self._book.unnamed)

    def foresee(self) -> None:
        if self._ranks:
            self._foremost()

    def charge_extend(self, client: str, tokens: int) -> None:
        account = self._settled(client)
        account.extend_tokens += tokens
        self._charge(account, self._prices.extend * tokens)

    def charge_output(self, client: str, tokens: int, expected: int = 0) -> None:
        self._charge_output(self._book.find(client), tokens)

    def _charge_output(self, account: Account, tokens: int) -> None:
        account.output_tokens += tokens
        self._charge(account, self._prices.output * tokens)

    def settle_by(self, settle: Settle) -> None:
        self._settle = settle

    def set_quantum(self, tokens: float) -> None:
        if not 0 < tokens < math.inf:
            raise ValueError(f"quantum_tokens is {tokens}, allowed: more than 0")
        self._settle(None)
        self._standings.set_quantum(tokens, self._book)
        self._chosen = None
        for account in self._book:
            self._seat(account)

    def reweigh(self, client: str, weight: float) -> None:
        account = self._settled(client)
        if account is not self._book.shared:
            self._standings.reweigh(account, weight)
            self._chosen = None
            self._seat(account)

    def clients(self) -> Iterator[ClientService]:
        self._settle(None)
        for account in self._book:
            yield ClientService(
                client=account.client,
                extend_tokens=account.extend_tokens,
                output_tokens=account.output_tokens,
                service=account.service,
                standing=self._standings.standing(account),
                waiting=len(account.queue),
            )

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Job]:
        return (entry.job for rank in self._ranks for entry in rank[-1].queue)

    def _check(self, job: Job) -> None:
        if job.request_id in self._entries:
            raise ValueError(f"request {job.request_id!r} waits already")
        if not LEAST_WEIGHT <= job.weight <= MOST_WEIGHT:
            raise ValueError(f"weight is {job.weight}, allowed: {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}")
        if not math.isfinite(job.arrival_s):
            raise ValueError(f"arrival_s is {job.arrival_s}, allowed: finite seconds")

    def _account(self, client: str) -> Account:
        """The account of an arriving request; a new one takes along what its name has waiting."""
        if self._ranks:
            self._settled(client)
        else:
            # How a client comes back may depend on who left last.
            self._settle(None)
        known = client in self._guests
        if not self._book.can_open(client) or not self._standings.admits(self._least(), known=known):
            return self._book.find(client)
        account = self._book.open(client)
        self._standings.opened(account, self._least(), known=known)
        for guest in sorted(self._guests.get(client, {}).values(), key=lambda entry: abs(entry.sequence)):
            self._take(guest)
            guest.account = account
            self._enter(guest)
        return account

    def _enter(self, entry: Entry) -> None:
        account, job = entry.account, entry.job
        if account is not self._book.shared:
            self._standings.reweigh(account, job.weight)
        elif job.client != OTHERS:
            self._guests.setdefault(job.client, {})[job.request_id] = entry
        entry.score = self._score(entry)
        account.queue.add(entry)
        self._entries[job.request_id] = entry
        if account.queue.by_prefix:
            self._look_ups.add(entry)
        self._moved(account)

    def _take(self, entry: Entry) -> None:
        account, request_id = entry.account, entry.job.request_id
        account.queue.remove(entry)
        del self._entries[request_id]
        if account.queue.by_prefix:
            self._look_ups.remove(entry)
        if account is self._book.shared and (guests := self._guests.get(entry.job.client)) is not None:
            del guests[request_id]
            if not guests:
                del self._guests[entry.job.client]
        if not account.queue:
            self._standings.leaves(account)
        self._moved(account)

    def _settled(self, client: str) -> Account:
        """The account of a client, charged with all that is due."""
        account = self._book.find(client)
        self._settle_account(account)
        return account

    def _settle_account(self, account: Account) -> bool:
        # The names on the shared account are not listed anywhere.
        return self._settle(None if account is self._book.shared else account.client)

    def _may_forget(self, account: Account) -> bool:
        # Who was charged just now was not idle.
        idle = not self._settle_account(account)
        if not self._ranks:
            self._settle(None)
        return idle and self._standings.may_forget(account, self._least())

    def _moved(self, account: Account) -> None:
        """A request of this account came or went."""
        self._chosen = None
        self._book.touch(account)
        self._seat(account)

    def _charge(self, account: Account, service: float) -> None:
        """What ``peek`` returned stays chosen, so that charging between ``peek`` and ``pop`` is safe."""
        account.service += service
        self._standings.charge(account, service)
        if account.rank is None:
            self._book.touch(account)
        elif service < 0:
            self._seat(account)

    def _seat(self, account: Account) -> None:
        """Give an account the rank that is due to it."""
        rank = None
        if account.queue:
            head = account.queue.head()
            lane = self._standings.lane(account)
            rank = (lane, -head.score, head.job.arrival_s, head.sequence, account)
        if rank == account.rank:
            return
        if account.rank is not None:
            self._ranks.remove(account.rank)
        if rank is not None:
            self._ranks.add(rank)
        account.rank = rank

    def _first(self) -> Account:
        """The account that is served next; those before it that were charged since are moved."""
        while True:
            rank = self._ranks[0]
            account: Account = rank[-1]
            self._settle_account(account)
            if rank[0] == self._standings.lane(account):
                return account
            self._seat(account)

    def _least(self) -> float | None:
        return self._standings.lane(self._first()) if self._ranks else None

    def _choose(self) -> Entry:
        if self._chosen is None:
            if not self._ranks:
                raise IndexError("no request waits")
            account = self._foremost()
            lane = self._standings.lane(account)
            if self._standings.moves_all(lane):
                self._settle(None)
            self._standings.reach(lane)
            self._chosen = account.queue.head()
        return self._chosen

    def _refresh(self) -> None:
        """Look up hits until the number or the time is used up. The last one may take longer: then the next
        steps make none until their time has made up for it, ``REPAID_STEPS`` at most."""
        left_s = self._refresh_s - self._overspent_s
        if left_s > 0:
            begin = self._book.now()
            for entry in self._look_ups.next():
                self._look_up(entry)
                if self._book.now() - begin >= left_s:
                    break
            left_s -= self._book.now() - begin
        self._overspent_s = min(max(0.0, -left_s), REPAID_STEPS * self._refresh_s)

    def _foremost(self) -> Account:
        """Whom a pick serves: the first one's hit is looked up, and as long as that makes another one the
        first, the other's."""
        account = self._first()
        if self._hits_matter():
            for _ in range(RECHECKS):
                if not self._look_up_head(account):
                    break
                account = self._first()
        return account

    def _look_up_head(self, account: Account) -> bool:
        """Look up the hit of an account's head; False if that was done in this step."""
        head = account.queue.head()
        if head.looked == self._step:
            return False
        self._look_up(head)
        return True

    def _look_up(self, entry: Entry) -> None:
        assert self._hit_tokens is not None
        hit = self._hit_tokens(entry.job.request_id)
        entry.looked = self._step
        if entry.account.queue.by_prefix:
            self._look_ups.looked_up(entry)
        if hit != entry.hit:
            entry.hit = hit
            account = entry.account
            head = account.queue.head()
            account.queue.rescore(entry, self._score(entry))
            if head is entry or account.queue.head() is entry:
                self._seat(account)

    def _score(self, entry: Entry) -> float:
        return entry.hit - self._ageing * entry.job.arrival_s

    def _hits_matter(self) -> bool:
        """Whether there is anything to choose between by hits: stock's order needs none."""
        if self._hit_tokens is None or len(self._entries) < 2:
            return False
        return len(self._ranks) > 1 or self._ranks[0][-1].queue.by_prefix

    def check_integrity(self) -> None:
        """Assert that requests, queues, ranks, accounts and look-ups describe the same. O(requests)."""
        accounts = list(self._book)
        queued = [entry for account in accounts for entry in account.queue]
        assert {e.job.request_id: e for e in queued} == self._entries
        assert len(queued) == len(self._entries)
        assert all(entry.account is account for account in accounts for entry in account.queue)
        assert [a.rank for a in accounts if a.rank] == [a.rank for a in accounts if a.queue]
        assert list(self._ranks) == sorted(a.rank for a in accounts if a.rank is not None)
        for rank in self._ranks:
            account = rank[-1]
            head = account.queue.head()
            assert rank[:-1] == (rank[0], -head.score, head.job.arrival_s, head.sequence)
            assert rank[0] <= self._standings.lane(account)
        guests = {e.job.request_id for e in self._book.shared.queue if e.job.client != OTHERS}
        assert guests == {name for group in self._guests.values() for name in group}
        assert self._chosen is None or self._chosen.job.request_id in self._entries
        self._look_ups.check_integrity()
