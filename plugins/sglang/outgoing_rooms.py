"""Prefill's side of the rooms: each chunk of a prompt is a hand-off of its own, under a lease of its own.

So the first chunks travel while the last ones are computed. A room is over when all its leases are: every
chunk was read and confirmed, or one was not read in time. Knows nothing of SGLang.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from penstock.connectors.config import DigestMode
from penstock.connectors.digest import Digester, Pending, sampled_positions
from penstock.connectors.handoff import HandOff, fingerprint
from penstock.connectors.lease import LeaseEnd
from penstock.connectors.runs import runs_of
from penstock.connectors.sender import Sender
from penstock.connectors.transfer_stats import TransferStatsData

RANK = 0
"""Every rank has a channel and leases of its own, so each is the only one of its sender."""


@dataclass(slots=True)
class _Room:
    leases: dict[str, str] = field(default_factory=dict)
    """Lease of each hand-off that has not ended, by the hand-off's name."""
    complete: bool = False


@dataclass(slots=True, frozen=True)
class RoomEnd:
    """A room is over; ``reason`` says why it failed, and is None where all of it was read."""

    room: int
    reason: str | None = None


class OutgoingRooms:
    """Hand-offs of one prefill rank. One thread at a time; questions are answered on the sender's own."""

    def __init__(self, sender: Sender, digester: Digester, digest: DigestMode, page_size: int) -> None:
        self._sender = sender
        self._digester = digester
        self._digest: DigestMode = digest
        self._page_size = page_size
        self._rooms: dict[int, _Room] = {}
        self._room_of: dict[str, int] = {}
        self._hashing: deque[tuple[str, Pending]] = deque()
        self._stats = TransferStatsData()
        self._serial = count()

    def __len__(self) -> int:
        return len(self._rooms)

    def offer(self, room: int, pages: Sequence[int]) -> HandOff:
        """Promise computed pages, in token order and at least one; the result is for the decode rank."""
        name = f"{room}.{next(self._serial)}"
        hand_off = self._sender.hand_off(
            name,
            runs_of(pages),
            num_tokens=len(pages) * self._page_size,
            # The room stands for the prompt: SGLang pairs requests by it.
            prompt=fingerprint((), (str(room),)),
            block_size=self._page_size,
            ranks=1,
        )
        self._rooms.setdefault(room, _Room()).leases[name] = hand_off.remote_lease
        self._room_of[name] = room
        if positions := sampled_positions(len(pages), self._digest):
            self._hashing.append((name, self._digester.begin([pages[i] for i in positions])))
        self._publish()
        return hand_off

    def complete(self, room: int) -> None:
        """No further chunk of the room follows."""
        self._rooms.setdefault(room, _Room()).complete = True

    def advance(self) -> list[RoomEnd]:
        """Publish digests that are ready; the rooms that ended since the last call, each once."""
        self._publish()
        failed: dict[int, str] = {}
        for ended in self._sender.collect():
            self._stats.expired_leases += ended.end is LeaseEnd.EXPIRED
            room = self._room_of.pop(ended.request_id, None)
            if room is None or (state := self._rooms.get(room)) is None:
                continue
            del state.leases[ended.request_id]
            if ended.end is LeaseEnd.EXPIRED:
                failed[room] = "decode did not read a chunk in time; its pages are free again"
            elif ended.end is LeaseEnd.RELEASED:
                failed[room] = "decode gave a chunk back"
        done = [room for room, state in self._rooms.items() if state.complete and not state.leases]
        ends = [RoomEnd(room, reason) for room, reason in failed.items()]
        ends += [RoomEnd(room) for room in done if room not in failed]
        for end in ends:
            self.forget(end.room)
        return ends

    def take_stats(self) -> TransferStatsData:
        """What has been observed since the last call."""
        self._stats.stale_reads_refused += self._sender.leases.take_stale_refused()
        stats, self._stats = self._stats, TransferStatsData()
        return stats

    def forget(self, room: int) -> None:
        """The room's pages may be handed to others: whoever still reads them will not be believed."""
        state = self._rooms.pop(room, None)
        if state is None:
            return
        for name in state.leases:
            self._room_of.pop(name, None)
        self._sender.leases.release(list(state.leases.values()))

    def _publish(self) -> None:
        while self._hashing and self._hashing[0][1].ready():
            name, pending = self._hashing.popleft()
            self._sender.add_digests(name, RANK, pending.result())
