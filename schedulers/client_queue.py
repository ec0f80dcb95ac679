"""The waiting requests of one client, in the order in which that client is served."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from sortedcontainers import SortedList

from penstock.schedulers.waiting import Job

if TYPE_CHECKING:
    from penstock.schedulers.accounts import Account

Rank = tuple[Any, ...]
"""Numbers that end in one that no other rank has, then what stands at that rank."""

NEVER = -1


class Entry:
    """One waiting request.

    ``hit`` is the estimate of its cached prefix in tokens, looked up in step ``looked``. ``score`` is ``hit``
    less what a later arrival costs. ``sequence`` grows with arrival; it is negative and falls for requests
    that were put back. ``samples`` are hashes at some depths of its prefix, kept because an engine may let
    ``job.prefix`` grow.
    """

    __slots__ = ("account", "hit", "job", "looked", "preempted", "rank", "samples", "score", "sequence")

    def __init__(self, job: Job, account: Account, sequence: int, *, preempted: bool = False) -> None:
        self.job = job
        self.account = account
        self.sequence = sequence
        self.preempted = preempted
        self.hit = 0
        self.score = 0.0
        self.looked = NEVER
        self.rank: Rank = ()
        self.samples: tuple[Hashable, ...] = ()

    @property
    def was_put_back(self) -> bool:
        """Whether it was popped before."""
        return self.sequence < 0

    def __repr__(self) -> str:
        return f"Entry({self.job.request_id!r}, hit={self.hit}, sequence={self.sequence})"


class ClientQueue(Protocol):
    """Where one client's requests wait."""

    @property
    def by_prefix(self) -> bool:
        """Whether the estimates of requests behind the head matter."""

    def add(self, entry: Entry) -> None: ...

    def remove(self, entry: Entry) -> None: ...

    def rescore(self, entry: Entry, score: float) -> None:
        """Give a waiting entry another score, and the place that goes with it."""

    def head(self) -> Entry:
        """The first. Raises IndexError when nothing waits."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Entry]: ...


class ArrivalQueue:
    """In order of arrival; what is put back goes to the front. Every operation is O(1)."""

    by_prefix = False

    def __init__(self) -> None:
        self._entries: OrderedDict[str, Entry] = OrderedDict()

    def add(self, entry: Entry) -> None:
        self._entries[entry.job.request_id] = entry
        if entry.was_put_back:
            self._entries.move_to_end(entry.job.request_id, last=False)

    def remove(self, entry: Entry) -> None:
        del self._entries[entry.job.request_id]

    def rescore(self, entry: Entry, score: float) -> None:
        entry.score = score

    def head(self) -> Entry:
        if not self._entries:
            raise IndexError("nothing waits")
        return next(iter(self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())


class PrefixQueue:
    """Preempted ones first, the last put back in front; then by score, highest first. O(log n)."""

    by_prefix = True

    def __init__(self) -> None:
        self._ranks = SortedList()

    def add(self, entry: Entry) -> None:
        if entry.preempted:
            entry.rank = (0, entry.sequence, entry)
        else:
            entry.rank = (1, -entry.score, entry.job.arrival_s, entry.sequence, entry)
        self._ranks.add(entry.rank)

    def remove(self, entry: Entry) -> None:
        self._ranks.remove(entry.rank)

    def rescore(self, entry: Entry, score: float) -> None:
        if entry.preempted:
            entry.score = score
            return
        self.remove(entry)
        entry.score = score
        self.add(entry)

    def head(self) -> Entry:
        entry: Entry = self._ranks[0][-1]
        return entry

    def __len__(self) -> int:
        return len(self._ranks)

    def __iter__(self) -> Iterator[Entry]:
        return (rank[-1] for rank in self._ranks)
