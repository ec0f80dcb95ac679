"""Random admission problems, and the definition of the optimum by trying every subset."""

from __future__ import annotations

import random
from itertools import chain, combinations

from penstock.schedulers.slo.admission import EPSILON, Candidate, Instance
from penstock.schedulers.slo.supply import Supply


class TableSupply(Supply):
    """A supply that falls with every decode, by its tier, and steps down where a tier appears."""

    def __init__(self, base, costs, steps, most):
        self.base, self.costs, self.steps, self.most = base, costs, steps, most

    @property
    def tiers(self):
        return len(self.costs)

    def rate(self, counts):
        rate = self.base - sum(cost * count for cost, count in zip(self.costs, counts, strict=True))
        return max(0.0, rate - max((s for s, c in zip(self.steps, counts, strict=True) if c), default=0))

    def sustains(self, counts):
        return sum(counts) <= self.most


def random_instance(seed, most_candidates=9, unit=False):
    rng = random.Random(seed)
    tiers = rng.choice((1, 2, 3, 4))
    number = rng.randint(1, most_candidates)
    base = rng.choice((50, 100, 200))
    supply = TableSupply(
        base,
        [rng.choice((0, 3, 10, 25)) for _ in range(tiers)],
        [rng.choice((0, 0, 20)) for _ in range(tiers)],
        rng.choice((3, 5, 100)),
    )
    load = rng.choice((0.5, 1.0, 2.0, 4.0))
    horizon = rng.choice((2, 5, 10))
    candidates = [
        Candidate(
            f"r{i}",
            rng.choice((rng.uniform(0, horizon), float(rng.randint(0, horizon)))),
            max(1, int(rng.expovariate(1) * base * horizon * load / number)),
            rng.randint(0, 40),
            rng.randrange(tiers),
            1.0 if unit else rng.choice((0.5, 1.0, 1.0, 2.0, 3.5)),
            rng.random() < 0.15,
        )
        for i in range(number)
    ]
    candidates.sort(key=lambda candidate: candidate.deadline_s)
    return Instance(candidates, rng.choice((60, 120, 10_000)), supply)


def definition_feasible(instance, chosen):
    """The rules of admission restated: serve by deadline, and compare lateness with the mandatory alone."""

    def left_over(places):
        counts, budget, now, left = [0] * instance.supply.tiers, 0.0, 0.0, {}
        for place, candidate in enumerate(instance.candidates):
            budget += instance.supply.rate(tuple(counts)) * (candidate.deadline_s - now)
            now = candidate.deadline_s
            if place in places:
                budget -= candidate.tokens
                counts[candidate.tier] += 1
                left[place] = (budget, tuple(counts))
        return left

    mandatory = {place for place, c in enumerate(instance.candidates) if c.mandatory}
    if not mandatory <= chosen:
        return False
    alone, together = left_over(mandatory), left_over(chosen)
    for place in chosen:
        budget, counts = together[place]
        if place in mandatory:
            if budget < min(0, alone[place][0]) - 1e-6:
                return False
        elif budget < -1e-6 or not instance.supply.sustains(counts):
            return False
    held = sum(instance.candidates[place].memory_tokens for place in chosen)
    needed = sum(instance.candidates[place].memory_tokens for place in mandatory)
    return held <= max(instance.memory_tokens, needed)


def best_by_trying(instance):
    places = range(len(instance.candidates))
    subsets = chain.from_iterable(combinations(places, size) for size in range(len(places) + 1))
    return max(
        sum(instance.candidates[p].profit for p in subset if not instance.candidates[p].mandatory)
        for subset in map(set, subsets)
        if definition_feasible(instance, subset)
    )


def moore_hodgson_one_by_one(instance):
    """Moore and Hodgson's rule by its words: accept by deadline; while it breaks, evict the dearest."""
    supply, demands, candidates = instance.supply, instance.demands, instance.candidates
    horizon = candidates[-1].deadline_s
    all_tokens = max(1.0, supply.rate(instance.no_counts) * horizon)
    all_memory = demands.memory_tokens or 1.0
    budget, now, accepted = 0.0, 0.0, []

    def counts():
        return tuple(sum(candidates[p].tier == tier for p in accepted) for tier in range(supply.tiers))

    def price(place):
        one = candidates[place]
        return (one.tokens / all_tokens + one.memory_tokens / all_memory) / one.profit

    def breaks(place):
        one = candidates[place]
        enough = max(demands.floors[place] if one.mandatory else 0.0, demands.reserves[place])
        later = sum(c.memory_tokens for c in candidates[place + 1 :] if c.mandatory)
        held = sum(candidates[p].memory_tokens for p in accepted)
        short = budget < enough - EPSILON * (1 + abs(enough)) or held + later > demands.memory_tokens
        return short or not (one.mandatory or supply.sustains(counts()))

    for place, one in enumerate(candidates):
        budget += supply.rate(counts()) * (one.deadline_s - now)
        now = one.deadline_s
        budget -= one.tokens
        accepted.append(place)
        while (optional := [p for p in accepted if not candidates[p].mandatory]) and breaks(place):
            dearest = min(optional, key=lambda p: (-price(p), p))
            accepted.remove(dearest)
            budget += candidates[dearest].tokens
    while optional and not definition_feasible(instance, set(accepted)):
        accepted.remove(optional.pop())
    return tuple(accepted)
