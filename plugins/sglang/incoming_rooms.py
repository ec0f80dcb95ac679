"""Decode's side of the rooms: pulls each chunk as it is announced, and says when a room has all its pages.

Pages are certain to be written no more once ``is_reading`` is false for their room; a room that failed says
so at once, which can be earlier. Knows nothing of SGLang.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from penstock.connectors.errors import FlowKVError, HandOffError
from penstock.connectors.handoff import HandOff, check_host, parse_hand_off
from penstock.connectors.receiver import Load, Outcome
from penstock.connectors.runs import count_blocks, runs_of
from penstock.connectors.transfer_stats import TransferStatsData
from penstock.plugins.sglang.room_messages import Chunk, Ending


class Loads(Protocol):
    """The part of ``ReceiverThread`` that is needed here."""

    def submit(self, load: Load) -> None:
        """Start a load; its outcome follows."""
        ...

    def outcomes(self) -> list[Outcome]:
        """Loads that ended since the last call."""
        ...


@dataclass(slots=True)
class _Room:
    pages: Sequence[int]
    serial: int
    loaded: int = 0
    descriptors: int = 0
    ending: Ending | None = None


@dataclass(slots=True, frozen=True)
class Arrival:
    """A room is over: ``aux`` are its rows of metadata, or ``error`` says why there are none."""

    room: int
    aux: list[bytes] | None = None
    error: FlowKVError | None = None
    descriptors: int = 0
    """That its reads took."""


class IncomingRooms:
    """Chunks of one decode rank. ``take`` may be called from another thread than the rest.

    Args:
        loads: what reads.
        page_size: tokens a page.
        allowed_hosts: as ``FlowKVConfig.allowed_hosts``.
    """

    def __init__(self, loads: Loads, page_size: int, allowed_hosts: Collection[str]) -> None:
        self._loads = loads
        self._page_size = page_size
        self._allowed_hosts = allowed_hosts
        self._lock = threading.Lock()
        self._rooms: dict[int, _Room] = {}
        self._reading: dict[str, tuple[int, int]] = {}
        self._reads_of: Counter[int] = Counter()
        self._over: list[Arrival] = []
        self._stats = TransferStatsData()
        self._serial = count()

    def open(self, room: int, pages: Sequence[int]) -> None:
        """Chunks of the room may come from now on; they go to ``pages``, in token order."""
        with self._lock:
            self._rooms[room] = _Room(list(pages), next(self._serial))

    def take(self, chunk: Chunk) -> None:
        """Read an announced chunk; of a room that is not open it is left alone."""
        with self._lock:
            state = self._rooms.get(chunk.room)
            if state is None:
                return
            try:
                load = self._load(state, chunk)
            except HandOffError as error:
                self._stats.add_failure(error.kind)
                self._end(chunk.room, error)
                return
            state.ending = chunk.ending or state.ending
            if load is not None:
                self._reading[load.request_id] = (chunk.room, state.serial)
                self._reads_of[chunk.room] += 1
                self._loads.submit(load)

    def advance(self) -> list[Arrival]:
        """The rooms that ended since the last call, each once."""
        outcomes = self._loads.outcomes()
        with self._lock:
            for outcome in outcomes:
                self._settle(outcome)
            for room, state in list(self._rooms.items()):
                if state.ending is not None and state.loaded == state.ending.pages:
                    del self._rooms[room]
                    self._over.append(Arrival(room, state.ending.aux, descriptors=state.descriptors))
            over, self._over = self._over, []
            return over

    def take_stats(self) -> TransferStatsData:
        """What has been observed since the last call."""
        with self._lock:
            stats, self._stats = self._stats, TransferStatsData()
            return stats

    def is_reading(self, room: int) -> bool:
        """Whether a page of the room may still be written."""
        return self._reads_of[room] > 0

    def forget(self, room: int) -> None:
        """Nothing more of the room is wanted; reads that have begun go on to their end."""
        with self._lock:
            self._rooms.pop(room, None)
            self._over = [arrival for arrival in self._over if arrival.room != room]

    def _load(self, state: _Room, chunk: Chunk) -> Load | None:
        if chunk.ending is not None and chunk.ending.pages != len(state.pages):
            raise HandOffError(f"{chunk.ending.pages} pages were handed off, of {len(state.pages)}")
        if chunk.hand_off is None:
            return None
        hand_off: HandOff = parse_hand_off(chunk.hand_off)
        check_host(hand_off, self._allowed_hosts)
        pages = count_blocks(hand_off.runs)
        if hand_off.block_size != self._page_size:
            raise HandOffError(f"block_size is {hand_off.block_size}, and {self._page_size} here")
        if chunk.first + pages > len(state.pages):
            raise HandOffError(
                f"pages {chunk.first} to {chunk.first + pages} were handed off, of {len(state.pages)}"
            )
        targets = tuple(runs_of(state.pages[chunk.first : chunk.first + pages]))
        return Load(f"{chunk.room}.{next(self._serial)}", hand_off, 0, targets)

    def _settle(self, outcome: Outcome) -> None:
        room, serial = self._reading.pop(outcome.load.request_id)
        self._reads_of[room] -= 1
        if not self._reads_of[room]:
            del self._reads_of[room]
        if outcome.error is not None:
            self._stats.add_failure(outcome.error.kind)
        elif outcome.stats is not None:
            self._stats.add_transfer(outcome.stats)
        state = self._rooms.get(room)
        if state is None or state.serial != serial:
            return
        if outcome.error is not None:
            self._end(room, outcome.error)
        else:
            state.loaded += count_blocks(outcome.load.targets)
            state.descriptors += outcome.stats.num_descriptors if outcome.stats else 0

    def _end(self, room: int, error: FlowKVError) -> None:
        del self._rooms[room]
        self._over.append(Arrival(room, error=error))
