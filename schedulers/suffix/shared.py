"""What a group of requests said, in bounded memory: the younger half grows, the older half is looked up.

When the younger half is full it becomes the older one, and what was the older one is forgotten as a whole. No
token is ever taken out of an automaton, which could not be done in less than linear time.
"""

from __future__ import annotations

from penstock.schedulers.suffix.automaton import SuffixAutomaton, Text
from penstock.schedulers.suffix.match import NO_MATCH, Draft, Match, advance, draft, end_of


class Voice:
    """One request of a group: its text in the younger half, and where it stands in the older one."""

    __slots__ = ("generation", "older", "text")

    def __init__(self) -> None:
        self.text = Text()
        self.older = NO_MATCH
        self.generation = 0


class SharedTexts:
    """Outputs of a group. ``depth`` as in ``SuffixAutomaton``; at most ``most_tokens`` are remembered."""

    def __init__(self, depth: int, most_tokens: int) -> None:
        self._depth = depth
        self._half = max(1, most_tokens // 2)
        self._generation = 0
        self._young = SuffixAutomaton(depth)
        self._old = SuffixAutomaton(depth)

    @property
    def tokens(self) -> int:
        """Tokens that are remembered."""
        return self._young.tokens + self._old.tokens

    def append(self, voice: Voice, token: int) -> None:
        """A request said ``token``."""
        if self._young.tokens >= self._half:
            self._old, self._young = self._young, SuffixAutomaton(self._depth)
            self._generation += 1
        self._follow(voice)
        voice.older = advance(self._old, voice.older, token, self._depth - 1)
        self._young.append(voice.text, token)

    def drafts(self, voice: Voice, most: int, least_match: int) -> tuple[Draft, Draft]:
        """What followed the end of the request's text, in the younger half and in the older one."""
        (young, at_young), (old, at_old) = self.places(voice)
        return draft(young, at_young, most, least_match), draft(old, at_old, most, least_match)

    def places(self, voice: Voice) -> tuple[tuple[SuffixAutomaton, Match], tuple[SuffixAutomaton, Match]]:
        """Where the request's text ends, in the younger half and in the older one."""
        self._follow(voice)
        return (self._young, end_of(self._young, voice.text)), (self._old, voice.older)

    def _follow(self, voice: Voice) -> None:
        """Bring a request's places up to date with the halves."""
        behind = self._generation - voice.generation
        if behind:
            # Its text in what was the younger half is a place in the older one now.
            voice.older = end_of(self._old, voice.text) if behind == 1 else NO_MATCH
            voice.text = Text()
            voice.generation = self._generation

    def check_integrity(self) -> None:
        """Assert the bound on memory, and both halves."""
        assert self._young.tokens <= self._half
        assert self._old.tokens <= self._half
        self._young.check_integrity()
        self._old.check_integrity()
