"""From scores at several rates to a capacity, and how far to trust a ratio of two capacities."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from penstock.benchmarks.slo_run import ATTAINED, Curve, mean_share
from penstock.simulation.measures import TpotRule

RESAMPLES = 500


class Interval(NamedTuple):
    """A value and the range of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def capacity(curve: Curve, rule: TpotRule, windows: Sequence[int]) -> float:
    """The rate at which the share of attained requests falls through 90 %, over the chosen windows.

    Between two rates the share is taken to fall with the logarithm of the rate. 0 where it is lower at the
    lowest rate already; the highest rate where it never falls.
    """
    rates = sorted(curve)
    shares = [mean_share([curve[rate][place] for place in windows], rule) for rate in rates]
    if shares[0] < ATTAINED:
        return 0.0
    for place in range(1, len(rates)):
        if shares[place] < ATTAINED:
            above, below = shares[place - 1] - ATTAINED, ATTAINED - shares[place]
            part = above / (above + below)
            return math.exp((1 - part) * math.log(rates[place - 1]) + part * math.log(rates[place]))
    return rates[-1]


def capacity_interval(curve: Curve, rule: TpotRule, seed: int = 0) -> Interval:
    """The capacity over all windows, and over windows drawn with replacement."""
    number = len(next(iter(curve.values())))
    draws = sorted(capacity(curve, rule, drawn) for drawn in _draws(number, seed))
    return _interval(capacity(curve, rule, range(number)), draws)


def ratio_interval(ours: Curve, theirs: Curve, rule: TpotRule, seed: int = 0) -> Interval:
    """The ratio of two capacities, the same windows drawn for both. Infinite over a capacity of 0."""
    number = len(next(iter(ours.values())))
    draws = sorted(
        _ratio(capacity(ours, rule, drawn), capacity(theirs, rule, drawn)) for drawn in _draws(number, seed)
    )
    whole = range(number)
    return _interval(_ratio(capacity(ours, rule, whole), capacity(theirs, rule, whole)), draws)


def geometric_mean(ratios: Sequence[Sequence[float]]) -> Interval:
    """Of the values of several intervals, treated as independent, with their extremes combined as errors of
    logarithms."""
    logs = [math.log(value) for value, _, _ in ratios]
    centre = sum(logs) / len(logs)
    below = math.sqrt(sum(_distance(value, low) ** 2 for value, low, _ in ratios)) / len(logs)
    above = math.sqrt(sum(_distance(value, high) ** 2 for value, _, high in ratios)) / len(logs)
    return Interval(math.exp(centre), math.exp(centre - below), math.exp(centre + above))


def _distance(value: float, end: float) -> float:
    """Of logarithms; an end that no window bounds counts as three times away."""
    return abs(math.log(end / value)) if 0 < end < math.inf else math.log(3)


def _draws(number: int, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [rng.choices(range(number), k=number) for _ in range(RESAMPLES)]


def _interval(value: float, draws: Sequence[float]) -> Interval:
    return Interval(value, draws[int(0.025 * len(draws))], draws[int(0.975 * len(draws)) - 1])


def _ratio(ours: float, theirs: float) -> float:
    if theirs:
        return ours / theirs
    return math.inf if ours else 1.0
