"""How many tokens a request will still generate: quantiles learned for each class, never the true length.

A histogram on a logarithmic grid for each class, with forgetting. A class that has seen little leans on all
classes together, and those on a prior. A request that has outlived everything seen so far is expected to
generate half again what it has.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections import OrderedDict

BUCKETS_PER_OCTAVE = 4
BUCKETS = 20 * BUCKETS_PER_OCTAVE + 1
MOST_CLASSES = 256
HALF_LIFE_REQUESTS = 1000.0
CLASS_WEIGHT = 16.0
PRIOR_WEIGHT = 8.0
FRESH_REQUESTS = 16


def bucket_of(tokens: int) -> int:
    """The bucket of a length: bucket ``b`` ends at ``2 ** (b / 4)`` tokens."""
    if tokens <= 1:
        return 0
    return min(BUCKETS - 1, math.ceil(math.log2(tokens) * BUCKETS_PER_OCTAVE - 1e-9))


def end_of(bucket: int) -> float:
    """The longest length of a bucket."""
    return float(2 ** (bucket / BUCKETS_PER_OCTAVE))


class Histogram:
    """Decayed counts of lengths. Old observations lose half their weight every thousand new ones."""

    def __init__(self) -> None:
        self.counts = [0.0] * BUCKETS
        self.total = 0.0
        self._unit = 1.0

    def add(self, tokens: int) -> None:
        """Count one length. New ones weigh more instead of old ones less, until the unit grows too large."""
        self._unit *= 2 ** (1 / HALF_LIFE_REQUESTS)
        self.counts[bucket_of(tokens)] += self._unit
        self.total += self._unit
        if self._unit > 1e12:
            self.counts = [count / self._unit for count in self.counts]
            self.total, self._unit = self.total / self._unit, 1.0

    @property
    def weight(self) -> float:
        """Observations, old ones decayed."""
        return self.total / self._unit

    def shares(self) -> list[float]:
        """The share of each bucket; all 0 without observations."""
        return [count / self.total for count in self.counts] if self.total else [0.0] * BUCKETS


class OutputLengths:
    """Quantiles of output lengths by class. Memory is bounded: the class unseen longest is forgotten."""

    def __init__(self, prior_median: float = 256.0, prior_sigma: float = 1.2) -> None:
        self._prior = _log_normal(prior_median, prior_sigma)
        self._all = Histogram()
        self._classes: OrderedDict[str, Histogram] = OrderedDict()
        self._tables: dict[tuple[str, float], list[float]] = {}
        self._unseen = 0

    def observe(self, class_name: str, output_tokens: int) -> None:
        """A request of a class ended after ``output_tokens``."""
        histogram = self._classes.get(class_name)
        if histogram is None:
            histogram = self._classes[class_name] = Histogram()
            if len(self._classes) > MOST_CLASSES:
                self._classes.popitem(last=False)
        self._classes.move_to_end(class_name)
        histogram.add(output_tokens)
        self._all.add(output_tokens)
        self._unseen += 1
        if self._unseen >= FRESH_REQUESTS or self._all.weight < FRESH_REQUESTS:
            self._tables.clear()
            self._unseen = 0

    def total(self, class_name: str, quantile: float, generated: int = 0, most: int = 1 << 20) -> float:
        """The quantile of the whole output's length, given that ``generated`` tokens were not the end."""
        table = self._tables.get((class_name, quantile))
        if table is None:
            table = self._tabulate(class_name, quantile)
        expected = table[bucket_of(generated)] if generated else table[-1]
        return float(min(most, max(generated + 1, expected)))

    def remaining(self, class_name: str, quantile: float, generated: int = 0, most: int = 1 << 20) -> float:
        """The quantile of what is still to come, at least 0."""
        return max(0.0, self.total(class_name, quantile, generated, most) - generated)

    def _tabulate(self, class_name: str, quantile: float) -> list[float]:
        """The quantile given survival of each bucket, and as the last entry given nothing."""
        shares = self._mixed(class_name)
        cumulative, summed = [], 0.0
        for share in shares:
            summed += share
            cumulative.append(summed)
        table = []
        for bucket in range(BUCKETS):
            before = cumulative[bucket]
            if summed - before < 0.005:
                table.append(1.5 * end_of(bucket))
            else:
                place = bisect_left(cumulative, before + quantile * (summed - before) - 1e-12)
                table.append(end_of(place))
        table.append(end_of(bisect_left(cumulative, quantile * summed - 1e-12)))
        if len(self._tables) > 4 * MOST_CLASSES:
            self._tables.clear()
        self._tables[class_name, quantile] = table
        return table

    def _mixed(self, class_name: str) -> list[float]:
        """The class, shrunk towards all classes, shrunk towards the prior."""
        trust = self._all.weight / (self._all.weight + PRIOR_WEIGHT)
        shares = [
            trust * own + (1 - trust) * prior
            for own, prior in zip(self._all.shares(), self._prior, strict=True)
        ]
        histogram = self._classes.get(class_name)
        if histogram is None:
            return shares
        trust = histogram.weight / (histogram.weight + CLASS_WEIGHT)
        return [
            trust * own + (1 - trust) * other for own, other in zip(histogram.shares(), shares, strict=True)
        ]

    def check_integrity(self) -> None:
        """Assert that memory is bounded and counts add up."""
        assert len(self._classes) <= MOST_CLASSES
        for histogram in (self._all, *self._classes.values()):
            assert math.isclose(sum(histogram.counts), histogram.total, rel_tol=1e-6, abs_tol=1e-9)


def _log_normal(median: float, sigma: float) -> list[float]:
    def below(tokens: float) -> float:
        return 0.5 * (1 + math.erf(math.log(tokens / median) / (sigma * math.sqrt(2))))

    ends = [below(end_of(bucket)) for bucket in range(BUCKETS)]
    return [ends[0], *(right - left for left, right in itertools.pairwise(ends))]
