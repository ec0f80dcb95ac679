"""Simple admission rules, and the choice among them and the dynamic program by name.

All walk once through the candidates by deadline. ``sustained`` asks only whether the decodes keep their
pace: prompts race for the deadlines, and who cannot win any more is demoted. EDF greedy accepts what fits.
Moore and Hodgson (1968)
accept everything and, where a deadline breaks, evict what costs most for its profit: optimal for equal
profits, one resource and a constant rate; here a rule of thumb that is checked against the optimum.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from penstock.schedulers.slo.admission import EPSILON, Candidate, Decision, Instance, add, feasible, profit_of
from penstock.schedulers.slo.dynamic_program import optimal
from penstock.schedulers.slo.supply import Counts

AdmissionRule = Callable[[Instance, int], Decision]
"""Decides an instance within a bound on the states it may make."""


def sustained(instance: Instance) -> Decision:
    """By deadline, accept each candidate whose decode all others' pace survives and whose memory is there."""
    walk = _Walk(instance)
    for place, candidate in enumerate(instance.candidates):
        if candidate.mandatory or walk.sustains(candidate):
            walk.accept(place, candidate)
    accepted = tuple(sorted(walk.accepted))
    return Decision(accepted, profit_of(instance, accepted), len(instance.candidates))


def edf_greedy(instance: Instance) -> Decision:
    """By deadline, accept each candidate that fits beside those accepted and the mandatory behind it."""
    walk = _Walk(instance)
    for place, candidate in enumerate(instance.candidates):
        walk.arrive(place)
        if candidate.mandatory or walk.fits(place, candidate):
            walk.accept(place, candidate)
    return walk.decide()


def moore_hodgson(instance: Instance) -> Decision:
    """By deadline, accept each candidate; while something breaks, evict the one that costs most."""
    walk = _Walk(instance)
    broken = walk.accept_until_it_breaks()
    if broken == len(instance.columns):
        return Decision(tuple(range(broken)), profit_of(instance, range(broken)), broken)
    accepted = instance.candidates[:broken]
    dearest = [(-walk.price(one), place) for place, one in enumerate(accepted) if not one.mandatory]
    heapq.heapify(dearest)
    for place in range(broken, len(instance.columns)):
        candidate = instance.candidates[place]
        walk.arrive(place)
        walk.accept(place, candidate)
        if not candidate.mandatory:
            heapq.heappush(dearest, (-walk.price(candidate), place))
        while dearest and not walk.holds(place, candidate):
            walk.evict(heapq.heappop(dearest)[1])
    return walk.decide()


def dynamic_program(instance: Instance, most_work: int | None) -> Decision:
    """The optimum; EDF greedy or Moore-Hodgson, whichever is worth more, past the bound on work."""
    simple = moore_hodgson(instance)
    if len(simple.accepted) == len(instance.candidates):
        return simple
    return optimal(instance, simple, edf_greedy, most_work)


RULES: dict[str, AdmissionRule] = {
    "sustained": lambda instance, _: sustained(instance),
    "edf_greedy": lambda instance, _: edf_greedy(instance),
    "moore_hodgson": lambda instance, _: moore_hodgson(instance),
    "dynamic_program": dynamic_program,
}


class _Walk:
    """Budget, memory and counts while candidates are met by deadline."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.supply, self.demands = instance.supply, instance.demands
        columns = instance.columns
        self.budget = 0.0
        self.memory = 0
        self.later_memory = int(columns.memory_tokens[columns.mandatory].sum())
        self.now = 0.0
        self.counts: Counts = instance.no_counts
        self.accepted: set[int] = set()
        horizon = float(columns.deadline_s[-1]) if len(columns) else 0.0
        self.all_tokens = max(1.0, self.supply.rate(self.counts) * horizon)
        self.all_memory = self.demands.memory_tokens or 1.0

    def accept_until_it_breaks(self) -> int:
        """Accept all candidates before the first one with which something breaks, and return its place; their
        number, if nothing does."""
        columns, demands, path = self.instance.columns, self.demands, self.instance.together
        number, mandatory = len(columns), columns.mandatory
        if mandatory.all():
            return number
        least = np.maximum(np.where(mandatory, demands.least, 0.0), demands.reserves)
        missing = path.budget < least - EPSILON * (1 + np.abs(least))
        later = self.later_memory - np.cumsum(np.where(mandatory, columns.memory_tokens, 0))
        missing |= path.memory + later > demands.memory_tokens
        missing |= ~mandatory & ~path.sustained
        # Before the first that may be turned down nothing can be helped.
        missing &= np.logical_or.accumulate(~mandatory)
        places = np.flatnonzero(missing)
        broken = int(places[0]) if len(places) else number
        if broken:
            self.budget, self.memory = float(path.budget[broken - 1]), int(path.memory[broken - 1])
            self.now, self.later_memory = float(columns.deadline_s[broken - 1]), int(later[broken - 1])
            self.counts = tuple(path.counts[broken].tolist())
            self.accepted.update(range(broken))
        return broken

    def arrive(self, place: int) -> None:
        deadline = self.instance.candidates[place].deadline_s
        self.budget += self.supply.rate(self.counts) * (deadline - self.now)
        self.now = deadline

    def accept(self, place: int, candidate: Candidate) -> None:
        self.accepted.add(place)
        self.budget -= candidate.tokens
        self.memory += candidate.memory_tokens
        if candidate.mandatory:
            self.later_memory -= candidate.memory_tokens
        self.counts = add(self.counts, candidate.tier)

    def evict(self, place: int) -> None:
        """Take an acceptance back. What its decode would have cost since its deadline is not given back."""
        candidate = self.instance.candidates[place]
        self.accepted.remove(place)
        self.budget += candidate.tokens
        self.memory -= candidate.memory_tokens
        self.counts = add(self.counts, candidate.tier, -1)

    def price(self, candidate: Candidate) -> float:
        """What a candidate takes of the engine, and of the memory where that is scarce, for its profit."""
        takes = candidate.tokens / self.all_tokens + candidate.memory_tokens / self.all_memory
        return takes / candidate.profit

    def fits(self, place: int, candidate: Candidate) -> bool:
        """Whether a candidate that is not accepted yet can be."""
        left = self.budget - candidate.tokens
        return left >= max(0.0, self.demands.reserves[place]) and self.sustains(candidate)

    def sustains(self, candidate: Candidate) -> bool:
        """Whether its decode and its memory fit beside those accepted and the mandatory behind it."""
        memory = self.memory + self.later_memory + candidate.memory_tokens
        fits = memory <= self.demands.memory_tokens
        return fits and self.supply.sustains(add(self.counts, candidate.tier))

    def holds(self, place: int, candidate: Candidate) -> bool:
        """Whether what is accepted so far leaves what it must."""
        floor = self.demands.floors[place] if candidate.mandatory else 0.0
        enough = max(floor, self.demands.reserves[place])
        if self.budget < enough - EPSILON * (1 + abs(enough)):
            return False
        if self.memory + self.later_memory > self.demands.memory_tokens:
            return False
        return candidate.mandatory or self.supply.sustains(self.counts)

    def decide(self) -> Decision:
        """The accepted set; the last that came is dropped while the decodes it adds break a mandatory one."""
        mandatory = self.instance.columns.mandatory
        accepted = sorted(self.accepted)
        optional = [place for place in accepted if not mandatory[place]]
        while optional and not feasible(self.instance, accepted):
            accepted.remove(optional.pop())
        return Decision(tuple(accepted), profit_of(self.instance, accepted), len(mandatory))
