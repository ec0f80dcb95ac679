"""Which waiting requests' prefix hits are looked up next, since a look-up in the engine is not free.

What the cache holds changes mostly through what is served: a request that is computed leaves its prefix
behind for those that share it. So the first to be looked up are the relatives of what was served, then
newcomers, and a share of every step goes round all that wait, which finds what was evicted.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator, Sequence

from penstock.schedulers.client_queue import Entry


def sample(prefix: Sequence[Hashable]) -> tuple[Hashable, ...]:
    """The chained hashes at depths 1, 4, 16, 64, ... blocks: O(log blocks) of them.

    Two prompts that share n blocks agree in every sample down to the largest power of four in n.
    """
    depths = (1 << bit for bit in range(0, len(prefix).bit_length(), 2))
    return tuple(dict.fromkeys(prefix[depth - 1] for depth in depths))


class Relatives:
    """Waiting requests by the samples of their prefixes."""

    def __init__(self) -> None:
        # Most samples belong to one request; a dictionary for each would take 200 bytes and more.
        self._groups: dict[Hashable, Entry | OrderedDict[str, Entry]] = {}

    def add(self, entry: Entry) -> None:
        """Enter a request. O(log blocks)."""
        entry.samples = sample(entry.job.prefix)
        for key in entry.samples:
            group = self._groups.get(key)
            if group is None:
                self._groups[key] = entry
            elif isinstance(group, Entry):
                self._groups[key] = OrderedDict((e.job.request_id, e) for e in (group, entry))
            else:
                group[entry.job.request_id] = entry

    def remove(self, entry: Entry) -> None:
        """Take a request out. O(log blocks)."""
        for key in entry.samples:
            group = self._groups[key]
            if isinstance(group, Entry):
                del self._groups[key]
                continue
            del group[entry.job.request_id]
            if len(group) == 1:
                (self._groups[key],) = group.values()

    def of(self, samples: Sequence[Hashable], most: int) -> Iterator[Entry]:
        """Up to ``most`` requests that share a prefix, the closest first; calls take turns in a group. Others
        may come and go meanwhile."""
        found: set[str] = set()
        for key in reversed(samples):
            group = self._groups.get(key)
            size = 0 if group is None else 1 if isinstance(group, Entry) else len(group)
            # A group lies in those of shallower samples, so one of the same size is the same.
            for _ in range(min(most - len(found), size) if size > len(found) else 0):
                entry = self._turn(key)
                if entry is not None and entry.job.request_id not in found:
                    found.add(entry.job.request_id)
                    yield entry

    def _turn(self, key: Hashable) -> Entry | None:
        group = self._groups.get(key)
        if group is None or isinstance(group, Entry):
            return group
        request_id, entry = next(iter(group.items()))
        group.move_to_end(request_id)
        return entry

    def check_integrity(self, entries: Sequence[Entry]) -> None:
        """Assert that exactly ``entries`` are indexed. O(entries)."""
        expected: dict[Hashable, set[str]] = {}
        for entry in entries:
            for key in entry.samples:
                expected.setdefault(key, set()).add(entry.job.request_id)
        actual = {
            key: {group.job.request_id} if isinstance(group, Entry) else set(group)
            for key, group in self._groups.items()
        }
        assert actual == expected
        assert all(isinstance(g, Entry) or len(g) > 1 for g in self._groups.values())


RELATIVES, NEWCOMERS, ROUND = range(3)
TURNS = (RELATIVES, NEWCOMERS, RELATIVES, ROUND)
"""Who is looked up in turn. A step that runs out of time leaves its place to the next one."""


class LookUps:
    """Chooses whose hit to look up, ``per_step`` a step: up to half for relatives of what was served, a
    quarter for the round of all, the rest for newcomers. Every operation is O(log blocks).
    """

    def __init__(self, per_step: int) -> None:
        self._per_step = per_step
        everyone = (per_step + 3) // 4
        self._most = {RELATIVES: per_step // 2, NEWCOMERS: per_step - everyone, ROUND: everyone}
        self._place = 0
        self._index = Relatives()
        # Relatives of what was served last first, and of these the closest; found when their turn comes.
        self._relatives: deque[Iterator[Entry]] = deque(maxlen=8)
        self._new: OrderedDict[str, Entry] = OrderedDict()
        # Longest not looked up first.
        self._round: OrderedDict[str, Entry] = OrderedDict()

    def add(self, entry: Entry) -> None:
        """A request waits whose hit is not known."""
        self._index.add(entry)
        self._new[entry.job.request_id] = entry
        self._round[entry.job.request_id] = entry

    def remove(self, entry: Entry) -> None:
        """It waits no more."""
        request_id = entry.job.request_id
        self._index.remove(entry)
        del self._round[request_id]
        self._new.pop(request_id, None)

    def served(self, entry: Entry) -> None:
        """A request that was removed is going to be computed: its relatives' hits are about to grow."""
        self._relatives.appendleft(self._index.of(entry.samples, (self._per_step + 7) // 8))

    def looked_up(self, entry: Entry) -> None:
        """Its hit is known as of now."""
        request_id = entry.job.request_id
        self._round.move_to_end(request_id)
        self._new.pop(request_id, None)

    def next(self) -> Iterator[Entry]:
        """The requests to look up in this step, each once. The caller reports each by ``looked_up`` before it
        asks for another; one that runs out of time asks for no more, and pays for no more."""
        left, most = dict(self._most), self._per_step
        seen: set[str] = set()
        in_vain = 0
        while len(seen) < most and in_vain < len(TURNS):
            kind = TURNS[self._place]
            self._place = (self._place + 1) % len(TURNS)
            entry = self._draw(kind) if left[kind] else None
            if entry is None or entry.job.request_id in seen:
                in_vain += 1
                continue
            in_vain = 0
            left[kind] -= 1
            seen.add(entry.job.request_id)
            yield entry

    def _draw(self, kind: int) -> Entry | None:
        """The next of a kind; ``looked_up`` moves it away."""
        if kind == RELATIVES:
            while self._relatives:
                entry = next(self._relatives[0], None)
                if entry is not None:
                    return entry
                self._relatives.popleft()
            return None
        return next(iter((self._new if kind == NEWCOMERS else self._round).values()), None)

    def check_integrity(self) -> None:
        """Assert that the lists name only requests that wait. O(requests)."""
        assert self._new.keys() <= self._round.keys()
        self._index.check_integrity(list(self._round.values()))
