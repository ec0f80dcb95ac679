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

from penstock.schedulers.slo.admission import Candidate, Decision, Instance, Reals, add, feasible, profit_of
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
    columns, demands, supply = instance.columns, instance.demands, instance.supply
    number, mandatory, walk = len(columns), columns.mandatory.tolist(), _Walk(instance)
    begun = walk.accept_until_it_breaks()
    if begun == number:
        return Decision(tuple(range(number)), profit_of(instance, range(number)), number)
    prices = walk.prices().tolist()
    dearest = [(-prices[place], place) for place in range(begun) if not mandatory[place]]
    heapq.heapify(dearest)
    # Hundreds of candidates are looked at, so without a call for each.
    tokens, held, tiers = columns.tokens.tolist(), columns.memory_tokens.tolist(), columns.tier.tolist()
    waits_s, least = instance.waits_s.tolist(), instance.least.tolist()
    budget, memory, later, counts = walk.budget, walk.memory, walk.later_memory, walk.counts
    for place in range(begun, number):
        budget += supply.rate(counts) * waits_s[place]
        budget -= tokens[place]
        memory += held[place]
        counts = add(counts, tiers[place])
        walk.accepted.add(place)
        if mandatory[place]:
            later -= held[place]
        else:
            heapq.heappush(dearest, (-prices[place], place))
        while dearest and not (
            budget >= least[place]
            and memory + later <= demands.memory_tokens
            and (mandatory[place] or supply.sustains(counts))
        ):
            # What its decode would have cost since its deadline is not given back.
            evicted = heapq.heappop(dearest)[1]
            walk.accepted.remove(evicted)
            budget += tokens[evicted]
            memory -= held[evicted]
            counts = add(counts, tiers[evicted], -1)
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
        missing = path.budget < self.instance.least
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

    def prices(self) -> Reals:
        """What each candidate takes of the engine, and of the memory where that is scarce, for its profit."""
        columns = self.instance.columns
        takes = columns.tokens / self.all_tokens + columns.memory_tokens / self.all_memory
        return takes / columns.profit

    def fits(self, place: int, candidate: Candidate) -> bool:
        """Whether a candidate that is not accepted yet can be."""
        left = self.budget - candidate.tokens
        return left >= max(0.0, self.demands.reserves[place]) and self.sustains(candidate)

    def sustains(self, candidate: Candidate) -> bool:
        """Whether its decode and its memory fit beside those accepted and the mandatory behind it."""
        memory = self.memory + self.later_memory + candidate.memory_tokens
        fits = memory <= self.demands.memory_tokens
        return fits and self.supply.sustains(add(self.counts, candidate.tier))

    def decide(self) -> Decision:
        """The accepted set; the last that came is dropped while the decodes it adds break a mandatory one."""
        mandatory = self.instance.columns.mandatory
        accepted = sorted(self.accepted)
        optional = [place for place in accepted if not mandatory[place]]
        while optional and not feasible(self.instance, accepted):
            accepted.remove(optional.pop())
        return Decision(tuple(accepted), profit_of(self.instance, accepted), len(mandatory))
