"""Leases: how long a sender keeps a finished prompt's blocks, and who may still read them.

A lease ends exactly once: every reading rank committed, the receiver released it, or its time ran out.
A commit says "my read has ended"; it succeeds only while the lease is held and every block still carries
the epoch that it had when the lease was granted, so a read that raced with reuse is refused, not counted.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import numpy.typing as npt

from penstock.connectors.runs import Run, blocks_of

logger = logging.getLogger(__name__)

Epochs = npt.NDArray[np.uint32]
Digests = npt.NDArray[np.uint64]


class LeaseEnd(Enum):
    """Why a lease ended."""

    COMMITTED = "committed"
    RELEASED = "released"
    EXPIRED = "expired"


@dataclass(slots=True)
class Lease:
    """Blocks of one request that a receiver may read until ``deadline`` (seconds of the table's clock)."""

    id: str
    request_id: str
    blocks: npt.NDArray[np.int64]
    epochs: Epochs | None
    ranks: int
    deadline: float
    last_deadline: float
    renewals: int = 0
    committed: set[int] = field(default_factory=set)
    digests: dict[int, Digests] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class Ended:
    """A lease that has just ended, and how often its receiver had renewed it."""

    request_id: str
    end: LeaseEnd
    renewals: int


class Commit(Enum):
    """Answer to a rank's claim that its read has ended."""

    ACCEPTED = "accepted"
    DIGESTS_PENDING = "digests pending"
    STALE = "stale"


class LeaseTable:
    """All leases of one sender. Thread-safe: a control thread commits while the scheduler grants and sweeps.

    Args:
        pickup_s: life of a lease after its grant, until it is renewed for the first time.
        duration_s: life of a lease after each renewal.
        longest_s: bound on a lease's life whatever the receiver says.
        clock: monotonic seconds.
        epochs: live array of one allocation counter a block, or None where the pool keeps none.
        expect_digests: whether a commit waits for the sender's own digests of the blocks.
    """

    RECENT = 1024
    """Ended leases whose end is remembered, to say what became of them."""

    def __init__(
        self,
        *,
        pickup_s: float,
        duration_s: float,
        longest_s: float,
        clock: Callable[[], float],
        epochs: Epochs | None = None,
        expect_digests: bool = False,
    ) -> None:
        self._pickup_s = pickup_s
        self._duration_s = duration_s
        self._longest_s = longest_s
        self._clock = clock
        self._epochs = epochs
        self._expect_digests = expect_digests
        self._lock = threading.Lock()
        self._held: dict[str, Lease] = {}
        self._by_request: dict[str, str] = {}
        self._ended: list[Ended] = []
        self._stale_refused = 0
        self._recent: OrderedDict[str, LeaseEnd] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def use_epochs(self, epochs: Epochs) -> None:
        """Compare leased blocks with ``epochs``, a live array indexed by block id, from the next grant on."""
        self._epochs = epochs

    def grant(self, request_id: str, runs: Sequence[Run], ranks: int) -> str:
        """Promise ``runs`` to ``ranks`` readers; returns the lease id, a random capability.

        Raises:
            ValueError: the request holds a lease already.
        """
        blocks = np.fromiter(blocks_of(runs), dtype=np.int64)
        now = self._clock()
        lease = Lease(
            id=secrets.token_hex(16),
            request_id=request_id,
            blocks=blocks,
            epochs=None if self._epochs is None else self._epochs[blocks].copy(),
            ranks=ranks,
            deadline=now + min(self._pickup_s, self._longest_s),
            last_deadline=now + self._longest_s,
        )
        with self._lock:
            if request_id in self._by_request:
                raise ValueError(f"request {request_id!r} holds a lease already")
            self._held[lease.id] = lease
            self._by_request[request_id] = lease.id
        return lease.id

    def renew(self, lease_ids: Sequence[str]) -> list[str]:
        """Give held leases ``duration_s`` from now, within their bound; returns those that are not held."""
        with self._lock:
            now = self._clock()
            unknown = []
            for lease_id in lease_ids:
                lease = self._held.get(lease_id)
                if lease is None or now >= lease.deadline:
                    unknown.append(lease_id)
                else:
                    lease.renewals += 1
                    lease.deadline = min(lease.last_deadline, now + self._duration_s)
            return unknown

    def add_digests(self, request_id: str, rank: int, digests: Digests) -> None:
        """Record one rank's digests of a leased request's blocks, in token order; late ones are dropped."""
        with self._lock:
            if lease := self._held.get(self._by_request.get(request_id, "")):
                lease.digests[rank] = digests

    def commit(self, lease_id: str, rank: int) -> tuple[Commit, Digests | None]:
        """A rank's read has ended; said once. ``ACCEPTED`` comes with the digests where they are expected."""
        with self._lock:
            held = self._held.get(lease_id)
            objection = self._objection(lease_id, held, rank)
            if held is None or objection:
                self._stale_refused += 1
                logger.warning("FlowKV throws a read away: %s", objection)
                return Commit.STALE, None
            if self._expect_digests and rank not in held.digests:
                return Commit.DIGESTS_PENDING, None
            held.committed.add(rank)
            if len(held.committed) == held.ranks:
                self._end(held, LeaseEnd.COMMITTED)
            return Commit.ACCEPTED, held.digests.get(rank)

    def release(self, lease_ids: Sequence[str]) -> int:
        """End leases that the receiver no longer wants; unknown ones are ignored. Returns how many ended."""
        with self._lock:
            held = [self._held[lease_id] for lease_id in dict.fromkeys(lease_ids) if lease_id in self._held]
            for lease in held:
                self._end(lease, LeaseEnd.RELEASED)
            return len(held)

    def collect(self) -> list[Ended]:
        """End what has run out, and return every lease that ended since the last call."""
        with self._lock:
            now = self._clock()
            for lease in [lease for lease in self._held.values() if now >= lease.deadline]:
                self._end(lease, LeaseEnd.EXPIRED)
            ended, self._ended = self._ended, []
            return ended

    def take_stale_refused(self) -> int:
        """Commits refused since the last call."""
        with self._lock:
            count, self._stale_refused = self._stale_refused, 0
            return count

    def check_integrity(self) -> None:
        """Assert that every held lease is indexed once and still awaits a reader."""
        with self._lock:
            assert {lease.request_id: lease.id for lease in self._held.values()} == self._by_request
            assert all(len(lease.committed) < lease.ranks for lease in self._held.values())

    def _objection(self, lease_id: str, held: Lease | None, rank: int) -> str | None:
        """Why the bytes that ``rank`` has read need not be the request's."""
        if held is None:
            end = self._recent.get(lease_id)
            return f"its lease was {end.value} before" if end else "its lease is unknown"
        if rank >= held.ranks:
            return f"rank {rank} reads for {held.request_id}, which has {held.ranks} ranks"
        if rank in held.committed:
            # The second read may have begun after the first ended: it proves nothing.
            return f"rank {rank} has ended its read of {held.request_id} before"
        if self._clock() >= held.deadline:
            return f"the lease of {held.request_id} has expired"
        if self._epochs is not None and held.epochs is not None:
            reused = np.flatnonzero(self._epochs[held.blocks] != held.epochs)
            if len(reused):
                return f"{len(reused)} blocks of {held.request_id} were handed out again"
        return None

    def _end(self, lease: Lease, end: LeaseEnd) -> None:
        del self._held[lease.id]
        del self._by_request[lease.request_id]
        self._ended.append(Ended(lease.request_id, end, lease.renewals))
        self._recent[lease.id] = end
        if len(self._recent) > self.RECENT:
            self._recent.popitem(last=False)
