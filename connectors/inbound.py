"""The decode side's book of handed-off requests: who pulls, who waits for whom, when a lease is given back.

One hand-off may stand behind several requests: a client that asks for ``n`` answers gets ``n`` requests with
the same prompt. One of them, the leader, pulls the blocks; the others wait and then find them in the local
prefix cache. A lease ends once, after its last user.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from penstock.connectors.errors import FlowKVError, StaleReadError
from penstock.connectors.handoff import HandOff


class Leases(Protocol):
    """The part of the lease keeper that the book needs."""

    def watch(self, hand_off: HandOff) -> None:
        """Keep the lease alive from now on."""
        ...

    def unwatch(self, hand_off: HandOff) -> None:
        """The lease has ended at the sender."""
        ...

    def release(self, hand_off: HandOff, reason: str) -> None:
        """Give the lease back."""
        ...

    def is_lost(self, hand_off: HandOff) -> bool:
        """The sender no longer holds the lease."""
        ...


class Verdict(Enum):
    """What a request in the queue may do about its prompt."""

    PULL = "pull the blocks"
    WAIT = "another request with the same hand-off is pulling them"
    LOCAL = "nothing to pull: the prefix cache and the model do the rest"
    BROKEN = "the hand-off cannot be used"


class _Phase(Enum):
    WAITING = "waiting"
    LOADING = "loading"
    SETTLED = "settled"


@dataclass(slots=True)
class _Inbound:
    hand_off: HandOff | None
    error: FlowKVError | None
    phase: _Phase = _Phase.WAITING
    ended: bool = False


class InboundRequests:
    """Requests whose prompts were prefilled elsewhere. One thread, the scheduler's."""

    def __init__(self, leases: Leases) -> None:
        self._leases = leases
        self._inbound: dict[str, _Inbound] = {}
        self._users: dict[str, set[str]] = {}
        self._leaders: dict[str, str] = {}

    @property
    def num_open(self) -> int:
        """Requests in the book."""
        return len(self._inbound)

    def add(self, request_id: str, hand_off: HandOff) -> None:
        """A request has arrived with a sound hand-off; its lease is kept alive from now on."""
        self._inbound[request_id] = _Inbound(hand_off, None)
        self._users.setdefault(hand_off.remote_lease, set()).add(request_id)
        self._leases.watch(hand_off)

    def add_broken(self, request_id: str, error: FlowKVError) -> None:
        """A request has arrived with a hand-off that cannot be used."""
        self._inbound[request_id] = _Inbound(None, error)

    def give_back(self, hand_off: HandOff, reason: str) -> None:
        """Release a lease that no request of the book uses."""
        if hand_off.remote_lease not in self._users:
            self._leases.release(hand_off, reason)

    def hand_off_of(self, request_id: str) -> HandOff | None:
        """The request's hand-off, where it has a sound one."""
        inbound = self._inbound.get(request_id)
        return inbound.hand_off if inbound else None

    def verdict(self, request_id: str) -> Verdict:
        """What the request may do now; free of side effects."""
        inbound = self._inbound.get(request_id)
        if inbound is None or inbound.phase is not _Phase.WAITING:
            return Verdict.LOCAL
        if self.error_of(request_id):
            return Verdict.BROKEN
        assert inbound.hand_off is not None
        leader = self._leaders.get(inbound.hand_off.remote_lease)
        if leader is None:
            return Verdict.PULL
        return Verdict.WAIT if self._is_loading(leader) else Verdict.LOCAL

    def error_of(self, request_id: str) -> FlowKVError | None:
        """Why the hand-off cannot be used, if it cannot."""
        inbound = self._inbound.get(request_id)
        if inbound is None or inbound.hand_off is None:
            return inbound.error if inbound else None
        led = inbound.hand_off.remote_lease in self._leaders
        if not led and self._leases.is_lost(inbound.hand_off):
            return StaleReadError("the prefill server no longer holds the lease")
        return None

    def start(self, request_id: str) -> None:
        """The request pulls, or reports that it cannot."""
        inbound = self._inbound[request_id]
        inbound.phase = _Phase.LOADING
        if inbound.hand_off:
            self._leaders.setdefault(inbound.hand_off.remote_lease, request_id)

    def skip(self, request_id: str) -> None:
        """The request needs none of the blocks."""
        inbound = self._inbound.get(request_id)
        if inbound and inbound.phase is _Phase.WAITING:
            self._settle(request_id, inbound, "the decode server needs none of the blocks")

    def finish_load(self, request_id: str, *, failed: bool) -> None:
        """The request's pull has ended on every rank."""
        inbound = self._inbound.get(request_id)
        if inbound and inbound.phase is _Phase.LOADING:
            self._settle(request_id, inbound, "the load failed" if failed else None)

    def end(self, request_id: str) -> None:
        """The request has ended, at whatever point; a pull under way is still awaited."""
        inbound = self._inbound.get(request_id)
        if inbound is None:
            return
        inbound.ended = True
        if inbound.phase is _Phase.WAITING:
            self._settle(request_id, inbound, "the request ended before its blocks were read")
        elif inbound.phase is _Phase.SETTLED:
            del self._inbound[request_id]

    def check_integrity(self) -> None:
        """Assert that every lease in the book has users, and every leader is one of them or has settled."""
        for lease, users in self._users.items():
            assert users, lease
            for request_id in users:
                hand_off = self._inbound[request_id].hand_off
                assert hand_off is not None
                assert hand_off.remote_lease == lease
        assert self._leaders.keys() <= self._users.keys()

    def _is_loading(self, request_id: str) -> bool:
        inbound = self._inbound.get(request_id)
        return inbound is not None and inbound.phase is _Phase.LOADING

    def _settle(self, request_id: str, inbound: _Inbound, release_reason: str | None) -> None:
        """The request is done with its hand-off; after the last user, the lease ends."""
        inbound.phase = _Phase.SETTLED
        if hand_off := inbound.hand_off:
            self._leave(request_id, hand_off, release_reason)
        if inbound.ended:
            del self._inbound[request_id]

    def _leave(self, request_id: str, hand_off: HandOff, release_reason: str | None) -> None:
        lease = hand_off.remote_lease
        users = self._users[lease]
        users.discard(request_id)
        leader = self._leaders.get(lease)
        # The sender has ended a lease that was read; one that could not be read serves nobody else either.
        if leader == request_id or (leader is None and not users):
            self._end_lease(hand_off, release_reason)
        if not users:
            del self._users[lease]
            self._leaders.pop(lease, None)

    def _end_lease(self, hand_off: HandOff, release_reason: str | None) -> None:
        if release_reason is None:
            self._leases.unwatch(hand_off)
        else:
            self._leases.release(hand_off, release_reason)
