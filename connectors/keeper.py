"""The decode scheduler's side of leases: renews those that it waits on, releases those that it gives up."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from penstock.connectors.control import ControlClient, Reply
from penstock.connectors.handoff import Address, HandOff
from penstock.connectors.messages import MAX_LEASES, Release, Renew, Renewed

logger = logging.getLogger(__name__)


@dataclass(slots=True, frozen=True)
class _Watch:
    address: Address
    lease: str


@dataclass(slots=True, frozen=True)
class _Drop:
    address: Address
    lease: str
    reason: str | None


@dataclass(slots=True)
class _State:
    watched: dict[Address, set[str]] = field(default_factory=dict)
    next_renewal: float = 0.0
    awaited: int = 0
    """Questions whose reply has not come."""

    @property
    def all_watched(self) -> set[str]:
        """Leases of all senders."""
        return set().union(*self.watched.values())


class LeaseKeeper:
    """Keeps leases alive from the arrival of a request until its blocks are read or given up.

    Commands return at once; one thread talks to the senders and sleeps while nothing is watched.

    Args:
        client: control client, used by the keeper's thread only.
        heartbeat_s: interval between renewals.
        clock: monotonic seconds.
    """

    FLUSH_S = 0.5
    """Longest time that closing waits for the last releases to leave."""
    REPLY_PAUSE_S = 0.02
    """Longest pause between looks at the replies while some are awaited."""

    def __init__(self, client: ControlClient, heartbeat_s: float, clock: Callable[[], float]) -> None:
        self._client = client
        self._heartbeat_s = heartbeat_s
        self._clock = clock
        self._commands: queue.SimpleQueue[_Watch | _Drop | None] = queue.SimpleQueue()
        self._lost: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="flowkv-leases", daemon=True)
        self._thread.start()

    def watch(self, hand_off: HandOff) -> None:
        """Renew a lease from now on, at once and then every ``heartbeat_s``."""
        self._commands.put(_Watch(hand_off.address, hand_off.remote_lease))

    def unwatch(self, hand_off: HandOff) -> None:
        """The lease has ended at the sender; forget it."""
        self._commands.put(_Drop(hand_off.address, hand_off.remote_lease, None))

    def release(self, hand_off: HandOff, reason: str) -> None:
        """Give the blocks back to the sender, which may be gone."""
        self._commands.put(_Drop(hand_off.address, hand_off.remote_lease, reason))

    def is_lost(self, hand_off: HandOff) -> bool:
        """True once the sender has said that it no longer holds the lease."""
        return hand_off.remote_lease in self._lost

    def close(self) -> None:
        """Release everything that is still watched, then stop."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        state = _State(next_renewal=self._clock())
        while self._serve_one(state):
            self._read(self._client.poll(), state)
            if state.watched and self._clock() >= state.next_renewal:
                self._renew(state)
        for address, leases in state.watched.items():
            self._tell(address, sorted(leases), "the decode server is shutting down", state)
        self._client.close(linger_s=self.FLUSH_S)

    def _serve_one(self, state: _State) -> bool:
        """Wait for a command or the next renewal; False when it is time to stop."""
        timeout = max(0.0, state.next_renewal - self._clock()) if state.watched else None
        if state.awaited:
            timeout = self.REPLY_PAUSE_S if timeout is None else min(timeout, self.REPLY_PAUSE_S)
        try:
            command = self._commands.get(timeout=timeout)
        except queue.Empty:
            return True
        match command:
            case None:
                return False
            case _Watch(address, lease):
                if not state.watched:
                    state.next_renewal = self._clock() + self._heartbeat_s
                state.watched.setdefault(address, set()).add(lease)
                self._ask(address, Renew([lease]), state)
            case _Drop(address, lease, reason):
                self._forget(state, address, lease)
                if reason is not None:
                    self._tell(address, [lease], reason, state)
        return True

    def _renew(self, state: _State) -> None:
        for address, leases in state.watched.items():
            ordered = sorted(leases)
            for start in range(0, len(ordered), MAX_LEASES):
                self._ask(address, Renew(ordered[start : start + MAX_LEASES]), state)
        state.next_renewal = self._clock() + self._heartbeat_s

    def _tell(self, address: Address, leases: list[str], reason: str, state: _State) -> None:
        for start in range(0, len(leases), MAX_LEASES):
            self._ask(address, Release(leases[start : start + MAX_LEASES], reason[:1024]), state)

    def _ask(self, address: Address, question: Renew | Release, state: _State) -> None:
        self._client.ask(address, question)
        state.awaited += 1

    def _read(self, replies: list[Reply], state: _State) -> None:
        state.awaited -= len(replies)
        for reply in replies:
            match reply.answer:
                case Renewed(lost=lost) if lost:
                    self._lost |= state.all_watched.intersection(lost)
                case Exception() as error:
                    logger.warning("FlowKV lease renewal: %s", error)
                case _:
                    pass

    def _forget(self, state: _State, address: Address, lease: str) -> None:
        self._lost.discard(lease)
        if leases := state.watched.get(address):
            leases.discard(lease)
            if not leases:
                del state.watched[address]
