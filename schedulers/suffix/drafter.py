"""Drafts for requests from their own texts and from what others of their group said.

A request's own text is its prompt and its output; a group remembers outputs. Of what the two propose, that is
taken which is expected to be right for longer.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from penstock.schedulers.suffix.automaton import SuffixAutomaton, Text
from penstock.schedulers.suffix.config import SuffixConfig
from penstock.schedulers.suffix.match import NO_MATCH, Draft, Match, advance, draft, end_of
from penstock.schedulers.suffix.shared import SharedTexts, Voice
from penstock.schedulers.suffix.tree import DraftTree, Place, grow
from penstock.schedulers.suffix.trust import Trust

MOST_GROUPS = 64
NO_DRAFT = Draft([], [], [])


class Proposal(NamedTuple):
    """Draft tokens, and the probability that each is right together with all before it."""

    tokens: list[int]
    survival: list[float]


@dataclass(slots=True, eq=False)
class _Live:
    """A request. Its own automaton lags behind by ``pending``, newest last, of which ``indexed`` are done."""

    group: str
    own: SuffixAutomaton
    pending: list[int]
    text: Text = field(default_factory=Text)
    voice: Voice = field(default_factory=Voice)
    indexed: int = 0
    proposed: Draft = NO_DRAFT
    trust: Trust | None = None
    tree: DraftTree | None = None


class SuffixDrafter:
    """Proposals for live requests. Deterministic: equal calls give equal drafts, on every worker."""

    def __init__(self, config: SuffixConfig) -> None:
        self._config = config
        self._depth = config.context_tokens + 1
        self._live: dict[str, _Live] = {}
        self._groups: OrderedDict[str, SharedTexts] = OrderedDict()
        self._own_trust, self._shared_trust = Trust(), Trust()
        self._left = config.indexed_per_step

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._live

    def begin_step(self) -> None:
        """Prompts may be indexed again, as many tokens as one step may spend."""
        self._left = self._config.indexed_per_step

    def open(self, request_id: str, prompt: Sequence[int], group: str = "") -> None:
        """A request with its prompt.

        Raises:
            ValueError: it is open already.
        """
        if request_id in self._live:
            raise ValueError(f"request {request_id!r} is open already")
        tail = list(prompt[max(0, len(prompt) - self._config.prompt_tokens) :])
        self._live[request_id] = _Live(group, SuffixAutomaton(self._depth), tail)
        self._index(self._live[request_id])

    def extend(self, request_id: str, tokens: Sequence[int]) -> None:
        """A request's text went on with ``tokens``.

        Raises:
            KeyError: it is not open.
        """
        live = self._live[request_id]
        self._judge(live, tokens)
        if live.pending:
            live.pending.extend(tokens)
            self._index(live)
        else:
            for token in tokens:
                live.own.append(live.text, token)
        if self._config.shared_tokens:
            group = self._group(live.group)
            for token in tokens:
                group.append(live.voice, token)

    def propose(self, request_id: str, most_tokens: int) -> Proposal:
        """Up to ``most_tokens`` tokens that may come next; fewer, or none, where too little speaks for them.

        Raises:
            KeyError: the request is not open.
        """
        live, least = self._live[request_id], self._config.least_match_tokens
        found = [(draft(live.own, self._place(live), most_tokens, least), self._own_trust)]
        if self._config.shared_tokens:
            shared = self._group(live.group).drafts(live.voice, most_tokens, least)
            found += [(one, self._shared_trust) for one in shared]
        best, best_expected = Proposal([], []), 0.0
        live.proposed, live.trust, live.tree = NO_DRAFT, None, None
        for one, trust in found:
            if one.tokens:
                proposal = self._judged(one, trust)
                expected = sum(proposal.survival)
                if expected > best_expected:
                    best, best_expected = proposal, expected
                    live.proposed, live.trust = one, trust
        return best

    def propose_tree(self, request_id: str, most_tokens: int, branches: int) -> DraftTree:
        """The ``most_tokens`` likeliest tokens that may come next, up to ``branches`` in one place, for whom
        verifying another token costs nothing: also those below ``least_probability``, or after less than
        ``least_match_tokens``.

        Raises:
            KeyError: the request is not open.
        """
        live = self._live[request_id]
        places = [Place(live.own, self._place(live), self._own_trust)]
        if self._config.shared_tokens:
            shared = self._group(live.group).places(live.voice)
            places += [Place(automaton, match, self._shared_trust) for automaton, match in shared]
        live.trust, live.tree = None, grow(places, most_tokens, branches)
        return live.tree

    def close(self, request_id: str) -> None:
        """A request is gone; its group remembers it.

        Raises:
            KeyError: it is not open.
        """
        del self._live[request_id]

    def _judged(self, one: Draft, trust: Trust) -> Proposal:
        """The part of a draft that is likely enough."""
        survival, reached = [], 1.0
        for share, matched in zip(one.shares, one.matched, strict=True):
            reached *= trust.probability(share, matched)
            if reached < self._config.least_probability:
                break
            survival.append(reached)
        return Proposal(one.tokens[: len(survival)], survival)

    def _judge(self, live: _Live, tokens: Sequence[int]) -> None:
        """Learn from the last draft up to its first wrong token, drafted or only thought of."""
        if live.tree is not None:
            live.tree.observe(tokens)
            live.tree = None
        if live.trust is None:
            return
        for token, drafted, share, matched in zip(tokens, *live.proposed, strict=False):
            live.trust.observe(share, matched, came=token == drafted)
            if token != drafted:
                break
        live.trust = None

    def _index(self, live: _Live) -> None:
        pending = live.pending
        steps = min(len(pending) - live.indexed, self._left)
        for token in pending[live.indexed : live.indexed + steps]:
            live.own.append(live.text, token)
        self._left -= steps
        live.indexed += steps
        if live.indexed == len(pending):
            pending.clear()
            live.indexed = 0

    def _place(self, live: _Live) -> Match:
        if not live.pending:
            return end_of(live.own, live.text)
        match = NO_MATCH
        for token in live.pending[-self._config.context_tokens :]:
            match = advance(live.own, match, token, self._config.context_tokens)
        return match

    def _group(self, name: str) -> SharedTexts:
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = SharedTexts(self._depth, self._config.shared_tokens)
            self._forget_groups()
        self._groups.move_to_end(name)
        return group

    def _forget_groups(self) -> None:
        """Forget groups that nobody is in, the longest not heard of first."""
        present = {live.group for live in self._live.values()}
        idle = [name for name in self._groups if name not in present]
        for name in idle[: max(0, len(self._groups) - MOST_GROUPS)]:
            del self._groups[name]

    def check_integrity(self) -> None:
        """Assert the bounds on memory, and every automaton."""
        for live in self._live.values():
            assert live.indexed <= len(live.pending)
            live.own.check_integrity()
        assert len(self._groups) <= MOST_GROUPS + len(self._live)
        for group in self._groups.values():
            group.check_integrity()
