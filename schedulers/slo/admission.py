"""The admission problem: which requests to serve so that all accepted ones get their first token in time.

Candidates are sorted by deadline. An accepted one needs its prompt computed before its deadline, decodes from
then on at its tier's pace, and holds KV cache. What the decodes leave of the engine is prefill supply, so
every acceptance slows down the prompts behind it (SLOs-Serve, section on soft admission). Candidates that
were admitted before are mandatory: no acceptance may make one late that would be in time without it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec

from penstock.schedulers.slo.supply import Counts, Supply

EPSILON = 1e-9


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A prompt that competes for the engine: ``deadline_s`` from now, ``memory_tokens`` of KV cache."""

    request_id: str
    deadline_s: float
    tokens: int
    memory_tokens: int
    tier: int
    profit: float = 1.0
    mandatory: bool = False


@dataclass(frozen=True, slots=True)
class Instance:
    """One admission problem. ``candidates`` ascend by deadline; ``memory_tokens`` is what is free."""

    candidates: Sequence[Candidate]
    memory_tokens: float
    supply: Supply
    demands: Demands = field(init=False)

    def __post_init__(self) -> None:
        deadlines = [candidate.deadline_s for candidate in self.candidates]
        assert deadlines == sorted(deadlines), "candidates ascend by deadline"
        object.__setattr__(self, "demands", Demands.of(self))

    @property
    def no_counts(self) -> Counts:
        """Nothing accepted, in any tier."""
        return (0,) * self.supply.tiers


@dataclass(frozen=True, slots=True)
class Demands:
    """What must be left at each candidate so that mandatory ones stay as they would be without new ones.

    ``floors[i]`` is the budget that candidate ``i`` must leave if it is mandatory: 0, or less where it is
    late anyway. ``reserves[i]`` is what must be left behind candidate ``i`` for mandatory ones with later
    deadlines. ``memory_tokens`` bounds the memory of all accepted: what is free, or what the mandatory
    hold, if more.
    """

    floors: Sequence[float]
    reserves: Sequence[float]
    memory_tokens: float

    @classmethod
    def of(cls, instance: Instance) -> Demands:
        """Serve the mandatory alone and look how late they are."""
        supply, counts = instance.supply, instance.no_counts
        rate = supply.rate(counts)
        budget, now, memory = 0.0, 0.0, 0.0
        floors, gains = [], []
        for candidate in instance.candidates:
            gain = rate * (candidate.deadline_s - now)
            now = candidate.deadline_s
            gains.append(gain)
            budget += gain
            if candidate.mandatory:
                budget -= candidate.tokens
                memory += candidate.memory_tokens
                counts = add(counts, candidate.tier)
                rate = supply.rate(counts)
            floors.append(min(0.0, budget))
        reserves = [-math.inf] * len(floors)
        needed = -math.inf
        for place in range(len(floors) - 1, -1, -1):
            reserves[place] = needed
            candidate = instance.candidates[place]
            if candidate.mandatory:
                needed = max(needed, floors[place]) + candidate.tokens
            needed -= gains[place]
        return cls(floors, reserves, max(instance.memory_tokens, memory))


@dataclass(frozen=True, slots=True)
class Decision:
    """Places of accepted candidates, ascending, what they are worth, and the work it took to find them.

    ``complete`` is False where the work bound ended an exact search and a simpler rule decided.
    """

    accepted: tuple[int, ...]
    profit: float
    work: int = 0
    complete: bool = True


def add(counts: Counts, tier: int, number: int = 1) -> Counts:
    """``counts`` with ``number`` more in ``tier``."""
    return (*counts[:tier], counts[tier] + number, *counts[tier + 1 :])


def feasible(instance: Instance, accepted: Sequence[int]) -> bool:
    """Whether a set of places that holds every mandatory one can be accepted."""
    chosen = set(accepted)
    supply, demands, counts = instance.supply, instance.demands, instance.no_counts
    budget, now, memory = 0.0, 0.0, 0
    for place, candidate in enumerate(instance.candidates):
        budget += supply.rate(counts) * (candidate.deadline_s - now)
        now = candidate.deadline_s
        if place not in chosen:
            if candidate.mandatory:
                return False
            continue
        budget -= candidate.tokens
        memory += candidate.memory_tokens
        counts = add(counts, candidate.tier)
        floor = demands.floors[place] if candidate.mandatory else 0.0
        if budget < floor - EPSILON * (1 + abs(floor)):
            return False
        if not candidate.mandatory and not supply.sustains(counts):
            return False
    return memory <= demands.memory_tokens


def profit_of(instance: Instance, accepted: Sequence[int]) -> float:
    """What a set is worth; mandatory ones are worth nothing, since they are in every set."""
    chosen = (instance.candidates[place] for place in accepted)
    return math.fsum(candidate.profit for candidate in chosen if not candidate.mandatory)
