"""The admission problem: which requests to serve so that all accepted ones get their first token in time.

Candidates are sorted by deadline. An accepted one needs its prompt computed before its deadline, decodes from
then on at its tier's pace, and holds KV cache. What the decodes leave of the engine is prefill supply, so
every acceptance slows down the prompts behind it (SLOs-Serve, section on soft admission). Candidates that
were admitted before are mandatory: no acceptance may make one late that would be in time without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, overload

import msgspec
import numpy as np
from numpy.typing import NDArray

from penstock.schedulers.slo.supply import Counts, Supply

EPSILON = 1e-9

Numbers = NDArray[np.int64]
Mask = NDArray[np.bool_]
Reals = NDArray[np.float64]


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
class Candidates(Sequence[Candidate]):
    """Candidates in columns."""

    request_ids: Sequence[str]
    deadline_s: Reals
    tokens: Numbers
    memory_tokens: Numbers
    tier: Numbers
    profit: Reals
    mandatory: Mask

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Candidates:
        """The columns of a sequence."""
        return cls(
            [one.request_id for one in candidates],
            np.array([one.deadline_s for one in candidates], np.float64),
            np.array([one.tokens for one in candidates], np.int64),
            np.array([one.memory_tokens for one in candidates], np.int64),
            np.array([one.tier for one in candidates], np.int64),
            np.array([one.profit for one in candidates], np.float64),
            np.array([one.mandatory for one in candidates], np.bool_),
        )

    def by_deadline(self) -> Candidates:
        """The same, sorted; at one deadline they stay as they are."""
        places = np.argsort(self.deadline_s, kind="stable")
        names = [self.request_ids[place] for place in places.tolist()]
        return Candidates(
            names,
            self.deadline_s[places],
            self.tokens[places],
            self.memory_tokens[places],
            self.tier[places],
            self.profit[places],
            self.mandatory[places],
        )

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> list[Candidate]: ...
    def __getitem__(self, place: int | slice) -> Candidate | list[Candidate]:
        if isinstance(place, slice):
            return list(self)[place]
        return Candidate(
            self.request_ids[place],
            float(self.deadline_s[place]),
            int(self.tokens[place]),
            int(self.memory_tokens[place]),
            int(self.tier[place]),
            float(self.profit[place]),
            bool(self.mandatory[place]),
        )

    def __iter__(self) -> Iterator[Candidate]:
        columns: Any = (self.deadline_s, self.tokens, self.memory_tokens, self.tier, self.profit)
        numbers = [column.tolist() for column in (*columns, self.mandatory)]
        return map(Candidate, self.request_ids, *numbers)

    def __len__(self) -> int:
        return len(self.request_ids)


class Instance:
    """One admission problem. ``candidates`` ascend by deadline; ``memory_tokens`` is what is free."""

    def __init__(self, candidates: Sequence[Candidate], memory_tokens: float, supply: Supply) -> None:
        self.columns = candidates if isinstance(candidates, Candidates) else Candidates.of(candidates)
        self.memory_tokens = memory_tokens
        self.supply = supply
        self.waits_s: Reals = np.diff(self.columns.deadline_s, prepend=0.0)
        """From the deadline before each candidate to its own."""
        assert (self.waits_s[1:] >= 0).all(), "candidates ascend by deadline"
        mandatory = self.columns.mandatory
        everybody = np.ones(len(mandatory), np.bool_)
        sets = (everybody,) if mandatory.all() else (mandatory, everybody)
        paths = self.paths(*sets)
        self.demands = Demands(self.columns, paths[0], memory_tokens)
        self.together = paths[-1]
        """What becomes of all, if all are accepted."""

    @cached_property
    def candidates(self) -> list[Candidate]:
        """One by one."""
        return list(self.columns)

    @cached_property
    def least(self) -> Reals:
        """The budget that must be left when a candidate and those before it are accepted."""
        floors = np.where(self.columns.mandatory, self.demands.least, 0.0)
        enough: Reals = np.maximum(floors, self.demands.reserves)
        return enough - EPSILON * (1 + np.abs(enough))

    @property
    def no_counts(self) -> Counts:
        """Nothing accepted, in any tier."""
        return (0,) * self.supply.tiers

    def paths(self, *sets: Mask) -> list[Path]:
        """For each of some sets what becomes of budget, memory and pace while its candidates are accepted by
        deadline."""
        columns, tiers, number = self.columns, self.supply.tiers, len(self.columns)
        in_tier = columns.tier[:, None] == np.arange(tiers)
        counts = np.zeros((len(sets), number + 1, tiers), np.int64)
        for chosen, counted in zip(sets, counts, strict=True):
            np.cumsum(in_tier & chosen[:, None], axis=0, out=counted[1:])
        rates, sustained = self.supply.of_each(counts.reshape(-1, tiers))
        found = []
        for place, chosen in enumerate(sets):
            rows = slice(place * (number + 1), (place + 1) * (number + 1))
            changes = np.empty(2 * number)
            changes[0::2] = rates[rows][:-1] * self.waits_s
            changes[1::2] = np.where(chosen, -columns.tokens, 0)
            memory = np.cumsum(np.where(chosen, columns.memory_tokens, 0))
            budget = np.cumsum(changes)[1::2]
            found.append(Path(counts[place], budget, changes[0::2], memory, sustained[rows][1:]))
        return found


@dataclass(frozen=True, slots=True)
class Path:
    """``counts`` before the first candidate and after each; after each the ``budget`` that is left, the
    ``memory`` that is held, and whether the pace is ``sustained``; ``gains`` of budget before each."""

    counts: Numbers
    budget: Reals
    gains: Reals
    memory: Numbers
    sustained: Mask


class Demands:
    """What must be left at each candidate so that mandatory ones stay as they would be without new ones.

    ``floors[i]`` is the budget that candidate ``i`` must leave if it is mandatory: 0, or less where it is
    late anyway. ``reserves[i]`` is what must be left behind candidate ``i`` for mandatory ones with later
    deadlines. ``memory_tokens`` bounds the memory of all accepted: what is free, or what the mandatory
    hold, if more.
    """

    def __init__(self, columns: Candidates, alone: Path, memory_tokens: float) -> None:
        """``alone`` is what becomes of the mandatory ones if nobody else is accepted: how late they are."""
        self._columns, self.alone = columns, alone
        self.least: Reals = np.minimum(0.0, alone.budget)
        self.memory_tokens = max(memory_tokens, int(alone.memory[-1]) if len(columns) else 0)

    @cached_property
    def floors(self) -> list[float]:
        """By candidate."""
        floors: list[float] = self.least.tolist()
        return floors

    @cached_property
    def reserves(self) -> list[float]:
        """By candidate; minus infinity where no mandatory one follows."""
        columns = self._columns
        reserves = [-math.inf] * len(columns)
        needed = -math.inf
        mandatory, tokens, gains = (
            columns.mandatory.tolist(),
            columns.tokens.tolist(),
            self.alone.gains.tolist(),
        )
        floors = self.floors
        for place in range(len(reserves) - 1, -1, -1):
            reserves[place] = needed
            if mandatory[place]:
                needed = max(needed, floors[place]) + tokens[place]
            needed -= gains[place]
        return reserves


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
    columns, demands = instance.columns, instance.demands
    chosen = np.zeros(len(columns), np.bool_)
    chosen[list(accepted)] = True
    if (columns.mandatory & ~chosen).any():
        return False
    (path,) = instance.paths(chosen)
    floors = np.where(columns.mandatory, demands.least, 0.0)
    short = path.budget < floors - EPSILON * (1 + np.abs(floors))
    strained = ~columns.mandatory & ~path.sustained
    if (chosen & (short | strained)).any():
        return False
    return not len(columns) or bool(path.memory[-1] <= demands.memory_tokens)


def profit_of(instance: Instance, accepted: Sequence[int]) -> float:
    """What a set is worth; mandatory ones are worth nothing, since they are in every set."""
    columns = instance.columns
    counted = np.where(columns.mandatory, 0.0, columns.profit)
    return math.fsum(counted[list(accepted)].tolist())
