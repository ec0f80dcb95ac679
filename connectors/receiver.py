"""The decode side: pulls handed-off blocks, proves that they are right, reports each request exactly once.

One :class:`Receiver` a rank. Every request walks through the same states; nothing blocks, so one thread
drives any number of them and tests drive it by hand:

    waiting for the peer's handshake -> reading -> asking the sender whether the lease was held -> verified

A request fails as a whole: its target blocks are reported as invalid and the engine's policy decides. It is
reported only when its target blocks are certain to be written no more, however long that takes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from penstock.connectors.compat import CompatibilityRecord, require_compatible
from penstock.connectors.config import FlowKVConfig
from penstock.connectors.control import Reply
from penstock.connectors.digest import Digester, sampled_positions
from penstock.connectors.errors import (
    DigestMismatchError,
    FlowKVError,
    IncompatibleError,
    PeerUnreachableError,
    StaleReadError,
    TransferFailedError,
)
from penstock.connectors.geometry import CacheGeometry, plan_moves
from penstock.connectors.handoff import Address, HandOff
from penstock.connectors.messages import (
    Answer,
    Confirmed,
    EndOfRead,
    Hello,
    NotYet,
    Question,
    Refused,
    Stale,
    Welcome,
)
from penstock.connectors.runs import Run, blocks_of, count_blocks, join_runs, slice_runs
from penstock.connectors.transports.base import State, Transfer, TransferStats, Transport

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 0.002
"""First pause before asking a sender again whose digests are not ready; each further one is twice as long."""
ASK_AGAIN_LONGEST_S = 0.05
"""Longest such pause."""

PeerKey = tuple[Address, str]
"""Address and instance of a sender."""


class ControlLink(Protocol):
    """The part of the control client that a receiver needs."""

    def ask(self, address: Address, question: Question) -> int:
        """Send a question; the reply carries the ticket returned."""
        ...

    def poll(self, wait_s: float = 0.0) -> list[Reply]:
        """Replies that have come since the last call."""
        ...

    def close(self) -> None:
        """Hang up, also when that has been done before."""
        ...


@dataclass(slots=True, frozen=True)
class Load:
    """One request's blocks to pull: the sender's blocks from position ``first`` on, into ``targets``."""

    request_id: str
    hand_off: HandOff
    first: int
    targets: tuple[Run, ...]

    @property
    def peer(self) -> PeerKey:
        """The sender's identity."""
        return self.hand_off.address, self.hand_off.remote_instance

    @property
    def target_blocks(self) -> list[int]:
        """Local block ids that the load writes, in token order."""
        return list(blocks_of(self.targets))


@dataclass(slots=True, frozen=True)
class Outcome:
    """How a load ended: ``error`` is None when the blocks hold verified bytes."""

    load: Load
    error: FlowKVError | None = None
    stats: TransferStats | None = None


@dataclass(slots=True)
class _Peer:
    hello: int
    waiting: list[Load] = field(default_factory=list)
    name: str = ""
    geometry: CacheGeometry | None = None


@dataclass(slots=True)
class _Reading:
    load: Load
    peer_name: str
    transfer: Transfer
    deadline: float
    overdue: bool = False


@dataclass(slots=True)
class _Asking:
    load: Load
    stats: TransferStats
    deadline: float
    pause: float = ASK_AGAIN_S


class Receiver:
    """One rank's receiving half. Not thread-safe: one thread calls ``submit``, ``step`` and ``outcomes``.

    Args:
        rank: tensor-parallel rank, here and at the sender.
        record: what the peer must match.
        geometry: this rank's KV cache.
        transport: byte mover with the cache registered.
        control: link to senders' control channels.
        digester: hashes local blocks.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        rank: int,
        record: CompatibilityRecord,
        geometry: CacheGeometry,
        transport: Transport,
        control: ControlLink,
        digester: Digester,
        config: FlowKVConfig,
        clock: Callable[[], float],
    ) -> None:
        self._rank = rank
        self._record = record
        self._geometry = geometry
        self._transport = transport
        self._control = control
        self._digester = digester
        self._config = config
        self._clock = clock
        self._peers: dict[PeerKey, _Peer] = {}
        self._leaving: set[str] = set()
        self._reading: list[_Reading] = []
        self._asking: dict[int, _Asking] = {}
        self._ask_at: list[tuple[float, _Asking]] = []
        self._outcomes: list[Outcome] = []

    @property
    def num_pending(self) -> int:
        """Loads that have not been reported."""
        waiting = sum(len(peer.waiting) for peer in self._peers.values())
        return waiting + len(self._reading) + len(self._asking) + len(self._ask_at) + len(self._outcomes)

    @property
    def is_reading(self) -> bool:
        """True while bytes move, so that the caller polls without pause."""
        return bool(self._reading)

    def submit(self, load: Load) -> None:
        """Take a load; its outcome follows, whatever happens."""
        peer = self._peers.get(load.peer)
        if peer is None:
            ticket = self._control.ask(load.hand_off.address, Hello(self._rank, self._record))
            self._peers[load.peer] = _Peer(hello=ticket, waiting=[load])
        elif peer.geometry is None:
            peer.waiting.append(load)
        else:
            self._start(load, peer)

    def step(self, wait_s: float = 0.0) -> None:
        """Advance every load as far as it goes; waits up to ``wait_s`` for a control reply."""
        for reply in self._control.poll(wait_s):
            self._on_reply(reply)
        self._poll_transfers()
        self._ask_again()
        if self._leaving:
            self._disconnect_idle()

    def outcomes(self) -> list[Outcome]:
        """Loads that ended since the last call."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def close(self) -> int:
        """Hang up and cancel: how many transfers are still active, and may write until a later call says 0.

        No load is taken or reported any more.
        """
        self._control.close()
        self._reading = [r for r in self._reading if r.transfer.poll() is State.ACTIVE]
        self._reading = [r for r in self._reading if not r.transfer.cancel()]
        return len(self._reading)

    def _start(self, load: Load, peer: _Peer) -> None:
        assert peer.geometry is not None
        try:
            source = slice_runs(load.hand_off.runs, load.first, count_blocks(load.targets))
            moves = plan_moves(peer.geometry, self._geometry, join_runs(source, load.targets))
            transfer = self._transport.read(peer.name, moves)
        except ValueError as error:
            self._fail(load, TransferFailedError(f"hand-off does not fit: {error}"))
        except TransferFailedError as error:
            self._forget(load.peer)
            self._fail(load, error)
        else:
            self._reading.append(_Reading(load, peer.name, transfer, self._deadline()))

    def _poll_transfers(self) -> None:
        states = [(reading, self._state_of(reading)) for reading in self._reading]
        self._reading = [reading for reading, state in states if state is State.ACTIVE]
        for reading, state in states:
            if state is State.DONE:
                self._ask(_Asking(reading.load, reading.transfer.stats(), self._deadline()))
            elif state is State.FAILED:
                self._forget(reading.load.peer)
                timeout = f"did not end within {self._config.transfer_timeout_s:g} s"
                reason = timeout if reading.overdue else "failed in the transport"
                host, port, _ = reading.load.hand_off.address
                self._fail(reading.load, TransferFailedError(f"transfer from {host}:{port} {reason}"))

    def _state_of(self, reading: _Reading) -> State:
        """The transfer's state; an overdue one has failed once it has ended or let itself be cancelled."""
        state = reading.transfer.poll()
        if state is State.ACTIVE and self._clock() >= reading.deadline:
            if not reading.overdue:
                logger.warning("FlowKV transfer for %s is overdue; cancelling", reading.load.request_id)
            reading.overdue = True
            return State.FAILED if reading.transfer.cancel() else State.ACTIVE
        return State.FAILED if reading.overdue and state is State.DONE else state

    def _ask(self, asking: _Asking) -> None:
        hand_off = asking.load.hand_off
        question = EndOfRead(hand_off.remote_lease, self._rank)
        self._asking[self._control.ask(hand_off.address, question)] = asking

    def _ask_again(self) -> None:
        now = self._clock()
        due = [asking for at, asking in self._ask_at if now >= at]
        self._ask_at = [(at, asking) for at, asking in self._ask_at if now < at]
        for asking in due:
            self._ask(asking)

    def _on_reply(self, reply: Reply) -> None:
        if asking := self._asking.pop(reply.ticket, None):
            self._on_end_of_read(asking, reply.answer)
            return
        for key, peer in list(self._peers.items()):
            if peer.hello == reply.ticket and peer.geometry is None:
                self._on_hello(key, peer, reply.answer)
                return

    def _on_hello(self, key: PeerKey, peer: _Peer, answer: Answer | FlowKVError) -> None:
        waiting, peer.waiting = peer.waiting, []
        try:
            peer.geometry, peer.name = self._accept(key, answer)
        except FlowKVError as error:
            del self._peers[key]
            for load in waiting:
                self._fail(load, error)
        else:
            for other in [k for k in self._peers if k[0][:2] == key[0][:2] and k != key]:
                self._forget(other)  # the port has one owner: earlier instances are dead
            for load in waiting:
                self.submit(load)

    def _accept(self, key: PeerKey, answer: Answer | FlowKVError) -> tuple[CacheGeometry, str]:
        (host, port, _), instance = key
        where = f"{host}:{port}"
        match answer:
            case FlowKVError():
                raise answer
            case Welcome():
                require_compatible(self._record, answer.record, where)
                if answer.instance != instance:
                    raise PeerUnreachableError(f"{where} has restarted since it handed the request off")
                if answer.transport != self._transport.name:
                    ours = self._transport.name
                    raise IncompatibleError(f"transport is {ours} here and {answer.transport} at {where}")
                return answer.geometry, self._transport.connect(answer.endpoint)
            case Refused(reason=reason, mismatches=mismatches):
                # The sender reports its own value first.
                fields = "; ".join(
                    f"{m.field} is {m.theirs} here and {m.ours} at {where}" for m in mismatches
                )
                raise IncompatibleError(f"{where} refused: {reason}" + (f": {fields}" if fields else ""))
            case _:
                raise PeerUnreachableError(f"{where} answered a handshake with {type(answer).__name__}")

    def _on_end_of_read(self, asking: _Asking, answer: Answer | FlowKVError) -> None:
        load = asking.load
        match answer:
            case Confirmed(digests=digests):
                error = self._verify(load, digests)
                self._outcomes.append(Outcome(load, error, asking.stats))
            case NotYet() if self._clock() < asking.deadline:
                self._ask_at.append((self._clock() + asking.pause, asking))
                asking.pause = min(2 * asking.pause, ASK_AGAIN_LONGEST_S)
            case NotYet():
                self._fail(load, TransferFailedError("the sender never hashed the blocks"))
            case Stale():
                self._fail(load, StaleReadError("the lease had ended before the read did"))
            case FlowKVError():
                self._forget(load.peer)
                self._fail(load, answer)
            case _:
                self._fail(load, TransferFailedError(f"unexpected answer {type(answer).__name__}"))

    def _verify(self, load: Load, digests: bytes) -> FlowKVError | None:
        """Compare the sampled blocks that were read; ``digests`` are of the whole prompt's sampled blocks."""
        total = count_blocks(load.hand_off.runs)
        positions = sampled_positions(total, self._config.digest)
        if len(digests) != 8 * len(positions):
            return DigestMismatchError(
                f"the sender sent {len(digests)} bytes of digests for {len(positions)} blocks of 8 bytes each"
            )
        theirs = np.frombuffer(digests, dtype="<u8")
        targets = load.target_blocks
        checked = [(i, p - load.first) for i, p in enumerate(positions) if 0 <= p - load.first < len(targets)]
        if not checked:
            return None
        ours = self._digester.digests([targets[offset] for _, offset in checked])
        wrong = np.flatnonzero(ours != theirs[[i for i, _ in checked]])
        if not len(wrong):
            return None
        where = checked[int(wrong[0])][1] + load.first
        return DigestMismatchError(
            f"{len(wrong)} of {len(checked)} blocks differ, the first at position {where}"
        )

    def _fail(self, load: Load, error: FlowKVError) -> None:
        self._outcomes.append(Outcome(load, error))

    def _deadline(self) -> float:
        return self._clock() + self._config.transfer_timeout_s

    def _forget(self, key: PeerKey) -> None:
        """Shake hands anew before the next load; transfers under way keep their connection."""
        peer = self._peers.get(key)
        if peer is not None and peer.geometry is not None:
            del self._peers[key]
            self._leaving.add(peer.name)

    def _disconnect_idle(self) -> None:
        """Disconnect from forgotten peers whose last transfer has ended, unless hands were shaken again."""
        self._leaving -= {peer.name for peer in self._peers.values()}
        idle = self._leaving - {reading.peer_name for reading in self._reading}
        self._leaving -= idle
        for name in idle:
            try:
                self._transport.disconnect(name)
            except TransferFailedError as error:
                logger.warning("FlowKV: %s", error)
