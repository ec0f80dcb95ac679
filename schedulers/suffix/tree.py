"""Drafts that branch: the likeliest continuations of a text, from several automatons, as one tree.

Where as many positions are verified whatever is drafted, a second guess for a token is worth as much as its
probability, and a longer chain no more than its own: nodes are taken likeliest first, wherever they hang.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import itemgetter
from typing import NamedTuple

from penstock.schedulers.suffix.automaton import SuffixAutomaton
from penstock.schedulers.suffix.match import Match
from penstock.schedulers.suffix.trust import Trust

END = -1
"""The parent of a tree's first tokens: the end of the text."""


class Place(NamedTuple):
    """Where a text stands in an automaton, and how far the automaton's shares may be believed."""

    automaton: SuffixAutomaton
    match: Match
    trust: Trust


class Ground(NamedTuple):
    """What speaks for a node: the share and the matched tokens of ``Draft``, and who said so."""

    share: float
    matched: int
    trust: Trust


@dataclass(slots=True)
class DraftTree:
    """Token ``tokens[k]`` follows node ``parents[k]``, which is before ``k``, or the end of the text;
    ``survival[k]`` is the probability that it is right with all before it, and never rises."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    survival: list[float] = field(default_factory=list)
    grounds: list[Ground] = field(default_factory=list)
    children: dict[int, dict[int, int]] = field(default_factory=lambda: {END: {}})
    """Nodes by parent and token."""

    def __len__(self) -> int:
        return len(self.tokens)

    def likely(self, least_probability: float, least_match: int) -> bool:
        """Whether a next token is right with at least this probability, after a match of so many tokens."""
        return any(
            self.survival[node] >= least_probability and self.grounds[node].matched >= least_match
            for node in self.children[END].values()
        )

    def observe(self, tokens: Sequence[int]) -> None:
        """The text went on with ``tokens``: learn from every node whose parent came true."""
        node = END
        for token in tokens:
            following = self.children[node]
            for guess, child in following.items():
                share, matched, trust = self.grounds[child]
                trust.observe(share, matched, came=guess == token)
            if token not in following:
                break
            node = following[token]

    def _add(self, parent: int, token: int, survival: float, ground: Ground) -> int:
        node = len(self.tokens)
        self.tokens.append(token)
        self.parents.append(parent)
        self.survival.append(survival)
        self.grounds.append(ground)
        self.children[parent][token] = node
        self.children[node] = {}
        return node


class _Guess(NamedTuple):
    """A node that may be added: it would follow ``parent``, at ``match`` of the automaton of ``place``."""

    parent: int
    token: int
    place: Place
    match: Match
    ground: Ground


def grow(places: Sequence[Place], most: int, branches: int) -> DraftTree:
    """The ``most`` likeliest continuations, no more than ``branches`` of which follow one node.

    Automatons that guess the same string share its nodes. With one branch the tree is a chain. Guesses are
    looked up as a chain's are (``match.draft``), from the longest suffix that something followed, be it of
    one token. O(most * places * (followers + log most)).
    """
    tree, order = DraftTree(), count()
    # The second element keeps the heap from comparing guesses, and ties in the order of their look-up.
    frontier: list[tuple[float, int, _Guess]] = []

    def look_up(parent: int, survival: float, place: Place, match: Match) -> None:
        for guess in _followers(parent, place, match, branches):
            ground = guess.ground
            reached = survival * ground.trust.probability(ground.share, ground.matched)
            heapq.heappush(frontier, (-reached, next(order), guess))

    for place in places:
        look_up(END, 1.0, place, place.match)
    while frontier and len(tree) < most:
        negative, _, guess = heapq.heappop(frontier)
        following = tree.children[guess.parent]
        if guess.token not in following:
            if len(following) == branches:
                continue
            tree._add(guess.parent, guess.token, -negative, guess.ground)
        look_up(following[guess.token], -negative, guess.place, guess.match)
    return tree


def _followers(parent: int, place: Place, match: Match, branches: int) -> list[_Guess]:
    """The most frequent followers of a match, at most ``branches``."""
    automaton = place.automaton
    state, length = automaton.continued(match.state, match.length)
    if length == 0:
        return []
    followers = list(automaton.followers(state))
    total = sum(times for _, _, times in followers)
    if len(followers) > branches:
        followers = heapq.nlargest(branches, followers, key=itemgetter(2))
    reached = min(length + 1, automaton.depth - 1)
    return [
        _Guess(
            parent,
            token,
            place,
            Match(automaton.shortened(target, reached), reached),
            Ground(times / total, length, place.trust),
        )
        for token, target, times in followers
    ]
