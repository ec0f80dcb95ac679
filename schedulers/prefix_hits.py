"""Which waiting requests' prefix hits are looked up next, since a look-up in the engine is not free.

What the cache holds changes mostly through what is served: a request that is computed leaves its prefix
behind for those that share it. So the first to be looked up are the relatives of what was served, then
newcomers, and a share of every step goes round all that wait, which finds what was evicted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from penstock.schedulers.client_queue import Entry


def sample(prefix: Sequence[Hashable]) -> tuple[Hashable, ...]:
    """The chained hashes at depths 1, 2, 4, 8, ... blocks: O(log blocks) of them.

    Two prompts that share n blocks agree in every sample down to the largest power of two in n.
    """
    depths = (1 << bit for bit in range(len(prefix).bit_length()))
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

    def of(self, samples: Sequence[Hashable], most: int) -> list[Entry]:
        """Up to ``most`` requests that share a prefix, the closest first; calls take turns in a group."""
        found: dict[str, Entry] = {}
        for key in reversed(samples):
            group = self._groups.get(key)
            if group is None:
                continue
            if isinstance(group, Entry):
                found.setdefault(group.job.request_id, group)
                continue
            # A group lies in those of shallower samples, so one of the same size is the same.
            if len(group) == len(found):
                continue
            for _ in range(min(most - len(found), len(group))):
                entry = self._turn(group)
                found.setdefault(entry.job.request_id, entry)
            if len(found) >= most:
                break
        return list(found.values())

    @staticmethod
    def _turn(group: OrderedDict[str, Entry]) -> Entry:
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


class LookUps:
    """Chooses whose hit to look up, ``per_step`` a step: up to half for relatives of what was served, a
    quarter for the round of all, the rest for newcomers. Every operation is O(log blocks).
    """

    def __init__(self, per_step: int) -> None:
        self._per_step = per_step
        self._relatives = Relatives()
        # Relatives of what was served last first, and of these the closest.
        self._due: OrderedDict[str, Entry] = OrderedDict()
        self._new: OrderedDict[str, Entry] = OrderedDict()
        # Longest not looked up first.
        self._round: OrderedDict[str, Entry] = OrderedDict()

    def add(self, entry: Entry) -> None:
        """A request waits whose hit is not known."""
        self._relatives.add(entry)
        self._new[entry.job.request_id] = entry
        self._round[entry.job.request_id] = entry

    def remove(self, entry: Entry) -> None:
        """It waits no more."""
        request_id = entry.job.request_id
        self._relatives.remove(entry)
        del self._round[request_id]
        self._new.pop(request_id, None)
        self._due.pop(request_id, None)

    def served(self, entry: Entry) -> None:
        """A request that was removed is going to be computed: its relatives' hits are about to grow."""
        for relative in reversed(self._relatives.of(entry.samples, (self._per_step + 7) // 8)):
            self._due[relative.job.request_id] = relative
            self._due.move_to_end(relative.job.request_id, last=False)
        while len(self._due) > self._per_step:
            self._due.popitem()

    def looked_up(self, entry: Entry) -> None:
        """Its hit is known as of now."""
        request_id = entry.job.request_id
        self._round.move_to_end(request_id)
        self._new.pop(request_id, None)
        self._due.pop(request_id, None)

    def next(self) -> list[Entry]:
        """The requests to look up in this step, each once; the caller reports them by ``looked_up``."""
        everyone = (self._per_step + 3) // 4
        chosen: dict[str, Entry] = {}
        for source, most in ((self._due, self._per_step // 2), (self._new, self._per_step - everyone)):
            for request_id, entry in source.items():
                if len(chosen) >= most:
                    break
                chosen[request_id] = entry
        for request_id, entry in self._round.items():
            if everyone == 0:
                break
            everyone -= 1
            chosen[request_id] = entry
        return list(chosen.values())

    def check_integrity(self) -> None:
        """Assert that the lists name only requests that wait. O(requests)."""
        assert self._new.keys() <= self._round.keys()
        assert self._due.keys() <= self._round.keys()
        self._relatives.check_integrity(list(self._round.values()))
