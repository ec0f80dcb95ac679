"""Where a text that grows stands in an automaton: the longest suffix of it that the automaton knows."""

from __future__ import annotations

from typing import NamedTuple

from penstock.schedulers.suffix.automaton import NONE, ROOT, SuffixAutomaton, Text


class Match(NamedTuple):
    """The last ``length`` tokens of a text are a string of ``state``."""

    state: int = ROOT
    length: int = 0


NO_MATCH = Match()


def end_of(automaton: SuffixAutomaton, text: Text) -> Match:
    """Where a text of the automaton itself ends: what came before ``depth`` tokens is left out."""
    length = min(text.length, automaton.depth - 1)
    return Match(automaton.shortened(text.counted, length), length)


def advance(automaton: SuffixAutomaton, match: Match, token: int, longest: int) -> Match:
    """The match after one more token, of up to ``longest`` tokens. O(1) amortised over a text."""
    state, length = match
    following = automaton.after(state, token)
    while following == NONE:
        if state == ROOT:
            return NO_MATCH
        state, length = automaton.parent(state)
        following = automaton.after(state, token)
    length = min(length + 1, longest)
    return Match(automaton.shortened(following, length), length)


class Draft(NamedTuple):
    """Tokens that may come next. ``shares[k]`` is how often what precedes token ``k`` was followed by it, of
    all times that anything followed; ``matched[k]`` the tokens that the look-up rested on."""

    tokens: list[int]
    shares: list[float]
    matched: list[int]


def draft(automaton: SuffixAutomaton, match: Match, most: int, least_match: int) -> Draft:
    """The likeliest continuation of ``match``, token by token; each time from the longest suffix that has
    one. A draft may go on in what it drafted itself, as a text that repeats does."""
    found = Draft([], [], [])
    longest = automaton.depth - 1
    state, length = match
    while len(found.tokens) < most:
        state, length = automaton.continued(state, length)
        if length < least_match:
            break
        token, state, count, total = automaton.likeliest(state)
        found.tokens.append(token)
        found.shares.append(count / total)
        found.matched.append(length)
        length = min(length + 1, longest)
        state = automaton.shortened(state, length)
    return found
