"""Draft lengths for one step: the tokens that are worth most for the time they take.

A draft token is worth the probability that it is reached and accepted, times what a token is worth to its
request: more while the request is behind its pace, less once it is not. That falls along a draft, and a
step's time is convex in its tokens, so taking the best next token until it no longer pays is optimal.
SLOs-Serve's lengths for each tier (its speculative planner) are the case in which only the pace counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

DINKELBACH_ROUNDS = 4

StepSeconds = Callable[[int, int], float]
"""Seconds of the step with so many draft tokens more, the longest draft having so many: convex in the first,
rising in both."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """A request that may draft.

    ``survival[k]`` is the probability that draft token ``k`` and all before it are accepted. A token is worth
    ``worth`` until the step is expected to give ``needed`` tokens (the sure one included), ``spare`` after.
    """

    request_id: str
    survival: Sequence[float]
    worth: float = 1.0
    needed: float = float("inf")
    spare: float = 0.0

    def values(self, most: int) -> list[float]:
        """What each further draft token is worth; never rises."""
        values, expected = [], 1.0
        for chance in self.survival[:most]:
            values.append(chance * (self.worth if expected < self.needed - 1e-9 else self.spare))
            expected += chance
        return values


@dataclass(frozen=True, slots=True)
class Lengths:
    """Draft tokens by request, and by how much they raise what the objective counts."""

    tokens: dict[str, int]
    gain: float


def allocate(
    drafting: Sequence[Drafting],
    seconds: StepSeconds,
    *,
    most_tokens: int,
    longest: int,
    price: float,
    opportunity: float = 0.0,
) -> Lengths:
    """Maximise worth minus ``price`` for each second, within ``most_tokens`` of the step.

    Every token must be worth more than ``opportunity``, what its place in the step is worth to others. O(R*K
    log(R*K)) for each possible longest draft.
    """
    values = _table(drafting, longest)
    best, best_gain, best_longest = 0, 0.0, 0
    empty_s = seconds(0, 0)
    for passes in range(1, values.shape[1] + 1):
        ordered = np.sort(values[:, :passes], axis=None)[::-1]
        ordered = ordered[ordered > opportunity][: max(0, most_tokens)]
        number, gain = _best_prefix(ordered, lambda tokens, p=passes: seconds(tokens, p) - empty_s, price)  # type: ignore[misc]
        if gain > best_gain + 1e-12:
            best, best_gain, best_longest = number, gain, passes
    return Lengths(_take(drafting, values[:, :best_longest], best), best_gain)


def fastest(
    drafting: Sequence[Drafting],
    seconds: StepSeconds,
    *,
    most_tokens: int,
    longest: int,
    other_worth: float = 0.0,
    opportunity: float = 0.0,
) -> Lengths:
    """Maximise worth a second. ``other_worth`` is what the step does besides. Dinkelbach's iteration.

    The gain is that in worth a second, as a share of what no draft gives.
    """
    sure = other_worth + sum(request.worth for request in drafting)
    plain = price = sure / max(1e-9, seconds(0, 0))
    chosen = Lengths({}, 0.0)
    if plain <= 0:
        return chosen
    worth = {request.request_id: request.values(longest) for request in drafting}
    for _ in range(DINKELBACH_ROUNDS):
        chosen = allocate(
            drafting, seconds, most_tokens=most_tokens, longest=longest, price=price, opportunity=opportunity
        )
        if not chosen.tokens:
            break
        value = sure + sum(sum(worth[name][:number]) for name, number in chosen.tokens.items())
        better = value / seconds(sum(chosen.tokens.values()), max(chosen.tokens.values()))
        if better <= price * (1 + 1e-9):
            break
        price = better
    return Lengths(chosen.tokens, price / plain - 1.0)


def _table(drafting: Sequence[Drafting], longest: int) -> NDArray[np.float64]:
    """Values ``[requests, positions]``, 0 where a request has no position."""
    table = np.zeros((len(drafting), longest))
    for row, request in zip(table, drafting, strict=True):
        values = request.values(longest)
        row[: len(values)] = values
    return table


def _best_prefix(
    ordered: NDArray[np.float64], extra_s: Callable[[int], float], price: float
) -> tuple[int, float]:
    """How many of the falling values to take: the objective is concave, so the peak is found by bisection."""
    total = np.concatenate([[0.0], np.cumsum(ordered)])

    def worth(tokens: int) -> float:
        return float(total[tokens]) - (price * extra_s(tokens) if tokens else 0.0)

    low, high = 1, len(ordered)
    while low < high:
        middle = (low + high) // 2
        if worth(middle + 1) > worth(middle) + 1e-15:
            low = middle + 1
        else:
            high = middle
    return (low, worth(low)) if low <= len(ordered) and worth(low) > 0 else (0, 0.0)


def _take(drafting: Sequence[Drafting], values: NDArray[np.float64], number: int) -> dict[str, int]:
    """The ``number`` most valuable tokens as lengths. Among equals the earlier position goes first."""
    if not number:
        return {}
    positions = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.lexsort((positions.ravel(), -values.ravel()))[:number]
    lengths = np.bincount(order // values.shape[1], minlength=len(drafting))
    names = (request.request_id for request in drafting)
    return {name: int(length) for name, length in zip(names, lengths, strict=True) if length}
