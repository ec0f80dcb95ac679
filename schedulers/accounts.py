"""Who has had what: one account a client, a bound on how many there are, and forgetting.

Names are free, so accounts are not: past ``max_clients``, or faster than a policy admits newcomers, a name
gets no account of its own, and all such names share one. Memory is O(max_clients) whatever names requests
bear.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from penstock.schedulers.client_queue import ArrivalQueue, ClientQueue, PrefixQueue, Rank
from penstock.schedulers.output_lengths import RunningMean
from penstock.schedulers.waiting import UNNAMED, Clock

OTHERS = "(others)"
"""The client that all names without an account of their own share. It also keeps what forgotten ones had."""


@dataclass(frozen=True, slots=True)
class Prices:
    """Service of one token that is computed for a prompt, and of one that is generated."""

    extend: float = 1.0
    output: float = 2.0

    def __post_init__(self) -> None:
        for name, weight in (("extend_weight", self.extend), ("output_weight", self.output)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} is {weight}, allowed: 0 or more")

    def of(self, extend_tokens: int, output_tokens: int) -> float:
        """Weighted tokens."""
        return self.extend * extend_tokens + self.output * output_tokens


class Account:
    """One client's service, waiting requests and standing.

    ``level`` and ``epoch`` belong to the policy: a deficit and the refill up to which it is worked out, or a
    virtual counter. ``expected`` is what its running requests are taken to cost still, in weighted tokens,
    ``ahead`` what ``level`` was charged before it was served: the same, or more where a quantum left no room
    to give it back. ``outputs`` is what its ended requests generated. ``rank`` is its place among the clients
    that wait, None when nothing of it waits.
    """

    __slots__ = (
        "active_s",
        "ahead",
        "client",
        "epoch",
        "expected",
        "extend_tokens",
        "level",
        "output_tokens",
        "outputs",
        "queue",
        "rank",
        "service",
        "weight",
    )

    def __init__(self, client: str, queue: ClientQueue, active_s: float) -> None:
        self.client = client
        self.queue = queue
        self.active_s = active_s
        self.weight = 1.0
        self.extend_tokens = 0
        self.output_tokens = 0
        self.service = 0.0
        self.level = 0.0
        self.epoch = 0
        self.expected = 0.0
        self.ahead = 0.0
        self.outputs: RunningMean | None = None
        self.rank: Rank | None = None

    def __repr__(self) -> str:
        return f"Account({self.client!r}, level={self.level}, waiting={len(self.queue)})"


class AccountBook:
    """All accounts. Some always exist: those of the unnamed and of ``listed``, and the one of ``OTHERS``.

    Args:
        clock: for idling.
        idle_s: a client that neither waits nor is charged for so long is forgotten.
        max_clients: accounts besides those.
        by_prefix: whether a named client's requests are ordered by prefix rather than by arrival.
        unnamed_by_prefix: the same for the unnamed.
        listed: clients that are known from the start and never forgotten.

    Raises:
        ValueError: ``idle_s`` or ``max_clients`` is negative.
    """

    SWEPT = 4

    def __init__(
        self,
        *,
        clock: Clock,
        idle_s: float,
        max_clients: int,
        by_prefix: bool,
        unnamed_by_prefix: bool,
        listed: Collection[str] = (),
    ) -> None:
        if not idle_s >= 0:
            raise ValueError(f"idle_s is {idle_s}, allowed: 0 or more")
        if max_clients < 0:
            raise ValueError(f"max_clients is {max_clients}, allowed: 0 or more")
        self._clock = clock
        self._idle_s = idle_s
        self._max_clients = max_clients
        self._make_queue: Callable[[], ClientQueue] = PrefixQueue if by_prefix else ArrivalQueue
        self.unnamed = Account(UNNAMED, PrefixQueue() if unnamed_by_prefix else ArrivalQueue(), clock())
        self.shared = Account(OTHERS, self._make_queue(), clock())
        self._permanent = {name: Account(name, self._make_queue(), clock()) for name in listed}
        self._permanent |= {UNNAMED: self.unnamed, OTHERS: self.shared}
        # Longest idle first.
        self._own: OrderedDict[str, Account] = OrderedDict()

    def now(self) -> float:
        """Seconds on the clock of the book."""
        return self._clock()

    def find(self, client: str) -> Account:
        """The account that a client's service is charged to: its own, or the shared one."""
        return self._own.get(client) or self._permanent.get(client) or self.shared

    def can_open(self, client: str) -> bool:
        """Whether a client has no account of its own yet and there is room for one."""
        return (
            client not in self._permanent and client not in self._own and len(self._own) < self._max_clients
        )

    def open(self, client: str) -> Account:
        """A new account for a client that ``can_open`` one."""
        assert self.can_open(client), client
        account = self._own[client] = Account(client, self._make_queue(), self._clock())
        return account

    def touch(self, account: Account) -> None:
        """The client did something: its idle time starts again. O(1)."""
        account.active_s = self._clock()
        if account.client in self._own:
            self._own.move_to_end(account.client)

    def forget_idle(self, may_forget: Callable[[Account], bool]) -> None:
        """Forget idle clients, a few a call. One that may not be forgotten stays for another ``idle_s``."""
        now = self._clock()
        for _ in range(min(self.SWEPT, len(self._own))):
            account = next(iter(self._own.values()))
            if now - account.active_s < self._idle_s:
                return
            if len(account.queue) or not may_forget(account):
                self.touch(account)
                continue
            del self._own[account.client]
            self.shared.extend_tokens += account.extend_tokens
            self.shared.output_tokens += account.output_tokens
            self.shared.service += account.service

    def __len__(self) -> int:
        """Accounts of clients that named themselves."""
        return len(self._own)

    def __iter__(self) -> Iterator[Account]:
        yield from self._permanent.values()
        yield from self._own.values()
