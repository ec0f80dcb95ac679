"""A suffix automaton over several texts that grow, with the number of times that each short string occurred.

A state stands for all strings that end at the same places; a transition appends a token; a state's link leads
to its longest suffix that ends at more places. Adding a token is O(1) amortised for the automaton (Blumer and
others, 1985) and one walk along at most ``depth`` links for the counts. Flat arrays hold all states: about 50
bytes a token, more where texts branch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

ROOT = 0
NONE = -1


class Text:
    """A text in an automaton: the state of all of it, and that of its longest counted suffix."""

    __slots__ = ("counted", "end", "length")

    def __init__(self) -> None:
        self.end = ROOT
        self.counted = ROOT
        self.length = 0
        """Tokens of the counted suffix, ``depth`` at most."""


class SuffixAutomaton:
    """All substrings of its texts. Counts are exact for strings of up to ``depth`` tokens."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.tokens = 0
        """Tokens that were added."""
        self._length = array("i", (0,))
        self._link = array("i", (NONE,))
        self._count = array("i", (0,))
        # Most states have one transition: it has a place here, and further ones are in ``_more``.
        self._token = array("q", (NONE,))
        self._target = array("i", (NONE,))
        self._more: dict[int, dict[int, int]] = {}

    def __len__(self) -> int:
        return len(self._length)

    def append(self, text: Text, token: int) -> None:
        """Let ``text`` go on with ``token``, which is not negative."""
        # A state may have been split since: its shorter strings belong to a link of it now.
        before = self.shortened(text.counted, text.length)
        text.end = self._extend(text.end, token)
        text.length = min(text.length + 1, self.depth)
        text.counted = state = self.shortened(self.after(before, token), text.length)
        link, count = self._link, self._count
        while state > ROOT:
            count[state] += 1
            state = link[state]
        self.tokens += 1

    def after(self, state: int, token: int) -> int:
        """The state of a string of ``state`` followed by ``token``; NONE where that never occurred."""
        if self._token[state] == token:
            return self._target[state]
        more = self._more.get(state)
        return NONE if more is None else more.get(token, NONE)

    def shortened(self, state: int, length: int) -> int:
        """The state of the last ``length`` tokens of a string of ``state``."""
        link, lengths = self._link, self._length
        while state > ROOT and lengths[link[state]] >= length:
            state = link[state]
        return state

    def parent(self, state: int) -> tuple[int, int]:
        """The link of a state that is not the root, and the tokens of its longest string."""
        link = self._link[state]
        return link, self._length[link]

    def continued(self, state: int, length: int) -> tuple[int, int]:
        """State and length of the longest suffix, of a string of ``state``, that something followed."""
        while state > ROOT and self._token[state] == NONE:
            state = self._link[state]
            length = self._length[state]
        return state, length

    def followers(self, state: int) -> Iterator[tuple[int, int, int]]:
        """Token, state and count of what followed a string of ``state``, first seen first."""
        if self._token[state] != NONE:
            yield self._token[state], self._target[state], self._count[self._target[state]]
            for token, target in self._more.get(state, {}).items():
                yield token, target, self._count[target]

    def likeliest(self, state: int) -> tuple[int, int, int, int]:
        """Token, state and count of what followed most often, and how often anything followed."""
        token, target = self._token[state], self._target[state]
        most = total = self._count[target]
        more = self._more.get(state)
        if more is not None:
            counts = self._count
            for other, other_target in more.items():
                count = counts[other_target]
                total += count
                if count > most:
                    token, target, most = other, other_target, count
        return token, target, most, total

    def find(self, tokens: list[int]) -> int:
        """The state of a string; NONE where it does not occur."""
        state = ROOT
        for token in tokens:
            state = self.after(state, token)
            if state == NONE:
                return NONE
        return state

    def count(self, tokens: list[int]) -> int:
        """How often a string of up to ``depth`` tokens occurred."""
        state = self.find(tokens)
        return 0 if state == NONE else self._count[state] if state > ROOT else self.tokens

    def _extend(self, last: int, token: int) -> int:
        """The state of a text whose state was ``last``, after one more token."""
        found = self.after(last, token)
        if found != NONE:
            whole = self._length[found] == self._length[last] + 1
            return found if whole else self._split(last, token, found)
        new = self._add(self._length[last] + 1, ROOT, 0)
        state = last
        while state != NONE and self.after(state, token) == NONE:
            self._connect(state, token, new)
            state = self._link[state]
        if state != NONE:
            found = self.after(state, token)
            whole = self._length[found] == self._length[state] + 1
            self._link[new] = found if whole else self._split(state, token, found)
        return new

    def _split(self, state: int, token: int, found: int) -> int:
        """Part the strings of ``found`` that are no longer than those of ``state`` and ``token`` from it."""
        part = self._add(self._length[state] + 1, self._link[found], self._count[found])
        self._token[part] = self._token[found]
        self._target[part] = self._target[found]
        if found in self._more:
            self._more[part] = dict(self._more[found])
        self._link[found] = part
        while state != NONE and self.after(state, token) == found:
            self._connect(state, token, part)
            state = self._link[state]
        return part

    def _add(self, length: int, link: int, count: int) -> int:
        self._length.append(length)
        self._link.append(link)
        self._count.append(count)
        self._token.append(NONE)
        self._target.append(NONE)
        return len(self._length) - 1

    def _connect(self, state: int, token: int, target: int) -> None:
        present = self._token[state]
        if present in (NONE, token):
            self._token[state] = token
            self._target[state] = target
        else:
            self._more.setdefault(state, {})[token] = target

    def check_integrity(self) -> None:
        """Assert the shape of the automaton: links shorten, transitions lengthen, counts add up."""
        assert len(self) <= 2 * self.tokens + 1
        for state in range(1, len(self)):
            link = self._link[state]
            assert 0 <= self._length[link] < self._length[state]
            assert self._more.get(state) is None or self._token[state] != NONE
            shortest = self._length[link] + 1
            counted = shortest <= self.depth
            assert not counted or self._count[state] > 0
            assert not counted or link == ROOT or self._count[link] >= self._count[state]
            followed = 0
            for _, target, count in self.followers(state):
                assert self._length[target] > self._length[state]
                followed += count
            if shortest < self.depth:
                assert followed <= self._count[state]
