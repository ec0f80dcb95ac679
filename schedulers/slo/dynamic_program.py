"""Admission that is worth most, by a dynamic program over deadlines (SLOs-Serve, soft admission).

States of one cell have looked at the same candidates and accepted equally many in each tier, so the same
supply lies before them. One state is no better than another that has at least its profit and its left-over
budget, holds no more memory, and is finished no later. All states of a cell were supplied up to the same
deadline, so the last is always equal and needs no coordinate. A state is reached from its parent by place
in a list that only grows; what is pruned is never pointed into.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import NamedTuple

from penstock.schedulers.slo.admission import EPSILON, Candidate, Decision, Instance, add, feasible, profit_of
from penstock.schedulers.slo.supply import Counts

NOBODY = -1

Rule = Callable[[Instance], Decision]


class State(NamedTuple):
    """One way to have come here. ``trail`` is the place of its last acceptance in the list of all."""

    profit: float
    budget: float
    memory: int
    trail: int


def dominates(left: State, right: State) -> bool:
    """Whether everything that ``right`` can still reach, ``left`` reaches with at least the profit."""
    return left.profit >= right.profit and left.budget >= right.budget and left.memory <= right.memory


def pareto(states: list[State]) -> list[State]:
    """The states that no other one dominates, one of each equal pair."""
    if len(states) < 2:
        return states
    states.sort(key=itemgetter(2))
    states.sort(key=itemgetter(0, 1), reverse=True)
    kept: list[State] = []
    for state in states:
        if not any(dominates(better, state) for better in kept):
            kept.append(state)
    return kept


class _Search:
    """The cells after some candidates, and the trail of all acceptances."""

    def __init__(self, instance: Instance, incumbent: Decision) -> None:
        self.instance = instance
        self.least_profit = incumbent.profit
        self.cells: dict[Counts, list[State]] = {instance.no_counts: [State(0.0, 0.0, 0, NOBODY)]}
        self.trail: list[tuple[int, int]] = []
        self.work = 0

    def step(self, place: int, waited_s: float, later_profit: float) -> None:
        """Let every state pass, or accept, the next candidate. ``later_profit`` is that of all behind it."""
        candidate = self.instance.candidates[place]
        cells: dict[Counts, list[State]] = {}
        for counts, states in self.cells.items():
            gain = self.instance.supply.rate(counts) * waited_s
            supplied = [state._replace(budget=state.budget + gain) for state in states]
            if not candidate.mandatory:
                cells.setdefault(counts, []).extend(self._hopeful(supplied, later_profit))
            more = add(counts, candidate.tier)
            if candidate.mandatory or self.instance.supply.sustains(more):
                accepted = [self._accept(place, candidate, state) for state in supplied]
                reached = [state for state in accepted if state is not None]
                cells.setdefault(more, []).extend(self._hopeful(reached, later_profit))
        self.cells = {counts: pareto(states) for counts, states in cells.items() if states}
        self.work += sum(len(states) for states in self.cells.values())

    def _accept(self, place: int, candidate: Candidate, state: State) -> State | None:
        demands = self.instance.demands
        floor = demands.floors[place] if candidate.mandatory else 0.0
        budget = state.budget - candidate.tokens
        memory = state.memory + candidate.memory_tokens
        if budget < floor - EPSILON * (1 + abs(floor)) or memory > demands.memory_tokens:
            return None
        self.trail.append((place, state.trail))
        profit = state.profit if candidate.mandatory else state.profit + candidate.profit
        return State(profit, budget, memory, len(self.trail) - 1)

    def _hopeful(self, states: list[State], later_profit: float) -> list[State]:
        """Those that can still beat the incumbent."""
        least = self.least_profit - later_profit + EPSILON
        return [state for state in states if state.profit > least]

    def best(self) -> tuple[int, ...] | None:
        """The places that the state worth most accepted; None if the incumbent stands."""
        states = [state for cell in self.cells.values() for state in cell]
        if not states:
            return None
        trail = max(states, key=itemgetter(0)).trail
        places = []
        while trail != NOBODY:
            place, trail = self.trail[trail]
            places.append(place)
        return tuple(reversed(places))


def optimal(instance: Instance, incumbent: Decision, fallback: Rule, most_work: int | None) -> Decision:
    """The decision worth most, or ``fallback``'s after more than ``most_work`` states.

    ``incumbent`` is a feasible decision: branches that cannot beat it are cut. O(N * cells * frontier).
    """
    if not feasible(instance, incumbent.accepted):
        incumbent = Decision((), float("-inf"))
    search = _Search(instance, incumbent)
    later = sum(c.profit for c in instance.candidates if not c.mandatory)
    now = 0.0
    for place, candidate in enumerate(instance.candidates):
        later -= 0.0 if candidate.mandatory else candidate.profit
        search.step(place, candidate.deadline_s - now, later)
        now = candidate.deadline_s
        if most_work is not None and search.work > most_work:
            simple = fallback(instance)
            best = max(simple, incumbent, key=lambda decision: decision.profit)
            return Decision(best.accepted, best.profit, search.work, complete=False)
    found = search.best()
    if found is None:
        return Decision(incumbent.accepted, incumbent.profit, search.work)
    return Decision(found, profit_of(instance, found), search.work)
