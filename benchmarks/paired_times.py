"""One way's times as a share of another's, over requests that both served, and how sure that is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

from penstock.benchmarks.flowkv_part import percentile

RESAMPLES = 2000


class Share(NamedTuple):
    """A ratio, and the range of its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def median_share(ours: Sequence[float], theirs: Sequence[float], seed: int = 0) -> Share:
    """Median of the ratios of single requests."""
    ratios = [mine / its for mine, its in zip(ours, theirs, strict=True)]
    return _resampled(lambda places: statistics.median(ratios[place] for place in places), len(ratios), seed)


def tail_share(ours: Sequence[float], theirs: Sequence[float], part: float, seed: int = 0) -> Share:
    """Ratio of the times below which ``part`` of all requests stay."""

    def ratio(places: Sequence[int]) -> float:
        mine, its = ([times[place] for place in places] for times in (ours, theirs))
        return percentile(mine, part) / percentile(its, part)

    return _resampled(ratio, len(ours), seed)


def _resampled(statistic: Callable[[Sequence[int]], float], number: int, seed: int) -> Share:
    """Of all requests, and of as many drawn with replacement; one draw is the same for both ways."""
    draw, places = Random(seed), range(number)
    found = sorted(statistic(draw.choices(places, k=number)) for _ in range(RESAMPLES))
    low, high = (found[round(share * (RESAMPLES - 1))] for share in (0.025, 0.975))
    return Share(statistic(places), low, high)
