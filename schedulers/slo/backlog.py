"""The waiting requests of the SLO policy, as the waiting order that an engine's queue is made of.

Three views of the same requests: by arrival (all), by deadline (those with targets that may still be met) and
best effort by arrival (the rest). While nobody has targets the order is that of arrival alone. A plan puts
the requests of its step in front.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from itertools import islice

from sortedcontainers import SortedDict, SortedList

from penstock.schedulers.slo.requests import Waiting
from penstock.schedulers.waiting import AllAlike, AsItComes, ClientService, Job

Key = tuple[float, int]


@dataclass(slots=True)
class _Entry:
    job: Waiting
    place: int
    key: Key
    best_effort: bool


class Backlog(AsItComes, AllAlike):
    """Implements ``WaitingOrder``; every change costs O(log n)."""

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._places: SortedDict = SortedDict()
        self._urgent: SortedList = SortedList()
        self._best_effort: SortedList = SortedList()
        self._front: dict[str, None] = {}
        self._next_back, self._next_front = 0, -1
        self.with_targets = 0
        """How many of those that wait have targets."""

    def add(self, job: Job) -> None:
        """A request arrives. A plain ``Job`` has no targets.

        Raises:
            ValueError: its id waits already.
        """
        self._insert(job, self._next_back)
        self._next_back += 1

    def put_back(self, job: Job, *, preempted: bool) -> None:
        """A request waits again, before all others where the order is that of arrival."""
        self._insert(job, self._next_front)
        self._next_front -= 1
        if not preempted and self.with_targets:
            self._front = {job.request_id: None, **self._front}

    def _insert(self, job: Job, place: int) -> None:
        if job.request_id in self._entries:
            raise ValueError(f"request {job.request_id!r} waits already")
        waiting = job if isinstance(job, Waiting) else _without_targets(job)
        best_effort = waiting.targets is None
        key = (waiting.arrival_s if best_effort else waiting.due_s, place)
        self._entries[job.request_id] = _Entry(waiting, place, key, best_effort)
        self._places[place] = job.request_id
        (self._best_effort if best_effort else self._urgent).add((*key, waiting))
        self.with_targets += waiting.targets is not None

    def remove(self, request_id: str) -> Job:
        """Take out a request wherever it stands.

        Raises:
            KeyError: it does not wait.
        """
        entry = self._entries.pop(request_id)
        del self._places[entry.place]
        self._view(entry).remove((*entry.key, entry.job))
        self._front.pop(request_id, None)
        self.with_targets -= entry.job.targets is not None
        return entry.job

    def demote(self, request_id: str) -> None:
        """Move a request to the best-effort view; no further call brings it back."""
        entry = self._entries[request_id]
        if not entry.best_effort:
            self._urgent.remove((*entry.key, entry.job))
            entry.key, entry.best_effort = (entry.job.arrival_s, entry.place), True
            self._best_effort.add((*entry.key, entry.job))

    def _view(self, entry: _Entry) -> SortedList:
        return self._best_effort if entry.best_effort else self._urgent

    def put_in_front(self, request_ids: Iterable[str]) -> None:
        """The requests of the next step, in order; those that do not wait are passed over."""
        self._front = {name: None for name in request_ids if name in self._entries}

    def peek(self) -> Job:
        """The next one of the plan; then by deadline, then best effort.

        Raises:
            IndexError: none waits.
        """
        return self._entries[self._first()].job

    def pop(self) -> Job:
        """Take out what ``peek`` returns.

        Raises:
            IndexError: none waits.
        """
        return self.remove(self._first())

    def _first(self) -> str:
        if self._front:
            return next(iter(self._front))
        first: str
        if self.with_targets:
            first = (self._urgent or self._best_effort)[0][2].request_id
        else:
            first = self._places.peekitem(0)[1]
        return first

    def urgent(self, most: int) -> list[tuple[float, Waiting]]:
        """Those with targets that may be met and when they are due, earliest deadline first."""
        return [(due_s, job) for due_s, _, job in islice(self._urgent, most)]

    @property
    def first_due_s(self) -> float:
        """The earliest deadline of those; infinite where there is none."""
        return float(self._urgent[0][0]) if self._urgent else float("inf")

    def best_effort(self, most: int) -> list[Waiting]:
        """The others, longest waiting first."""
        return [job for _, _, job in islice(self._best_effort, most)]

    @property
    def names(self) -> Set[str]:
        """Ids of all that wait."""
        return self._entries.keys()

    def get(self, request_id: str) -> Waiting | None:
        """A waiting request; None if it does not wait."""
        entry = self._entries.get(request_id)
        return entry.job if entry else None

    def begin_step(self) -> None:
        """Nothing is looked up anew."""

    def charge_extend(self, client: str, tokens: int) -> None:
        """Service is not counted by client."""

    def charge_output(self, client: str, tokens: int, expected: int = 0) -> None:
        """Service is not counted by client."""

    def clients(self) -> Iterable[ClientService]:
        """No clients are remembered."""
        return ()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._entries

    def __iter__(self) -> Iterator[Job]:
        """By arrival."""
        return (self._entries[name].job for name in self._places.values())

    def check_integrity(self) -> None:
        """Assert that the three views hold the same requests, each once."""
        names = set(self._entries)
        views = [job.request_id for view in (self._urgent, self._best_effort) for _, _, job in view]
        assert sorted(views) == sorted(names)
        assert sorted(self._places.values()) == sorted(names)
        assert set(self._front) <= names
        assert self.with_targets == sum(e.job.targets is not None for e in self._entries.values())
        for name, entry in self._entries.items():
            assert self._places[entry.place] == name
            assert entry.best_effort or entry.job.targets is not None


def _without_targets(job: Job) -> Waiting:
    return Waiting(job.request_id, job.client, job.tokens, job.arrival_s, job.prefix, job.weight)
