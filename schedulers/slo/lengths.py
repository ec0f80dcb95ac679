"""How many tokens a request will still generate: quantiles learned for each class, never the true length.

A histogram on a logarithmic grid for each class, with forgetting. A class that has seen little leans on all
classes together, and those on a prior. A request that has outlived everything seen so far is expected to
generate half again what it has.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence, Set
from itertools import chain

import numpy as np
from numpy.typing import NDArray

Shares = NDArray[np.float64]
"""``[BUCKETS]``, by bucket of a length."""
Tokens = NDArray[np.int64] | NDArray[np.float64]

BUCKETS_PER_OCTAVE = 4
BUCKETS = 20 * BUCKETS_PER_OCTAVE + 1
MOST_CLASSES = 256
HALF_LIFE_REQUESTS = 1000.0
CLASS_WEIGHT = 16.0
PRIOR_WEIGHT = 8.0
FRESH_REQUESTS = 16
OUTLIVED = 0.005
"""A request that lived longer than all but so many has no quantile of its own."""


def bucket_of(tokens: int) -> int:
    """The bucket of a length: bucket ``b`` ends at ``2 ** (b / 4)`` tokens."""
    if tokens <= 1:
        return 0
    return min(BUCKETS - 1, math.ceil(math.log2(tokens) * BUCKETS_PER_OCTAVE - 1e-9))


def end_of(bucket: int) -> float:
    """The longest length of a bucket."""
    return float(2 ** (bucket / BUCKETS_PER_OCTAVE))


ENDS = tuple(end_of(bucket) for bucket in range(BUCKETS))
EACH_END = np.array(ENDS)
LAST_TOKENS = np.array([math.floor(end * (1 + 1e-10)) for end in ENDS])
"""The most tokens of a length in each bucket, but the last, which has no end."""


class Histogram:
    """Decayed counts of lengths. Old observations lose half their weight every thousand new ones."""

    def __init__(self) -> None:
        self.counts: Shares = np.zeros(BUCKETS)
        self.total = 0.0
        self._unit = 1.0

    def add(self, tokens: int) -> None:
        """Count one length. New ones weigh more instead of old ones less, until the unit grows too large."""
        self._unit *= 2 ** (1 / HALF_LIFE_REQUESTS)
        self.counts[bucket_of(tokens)] += self._unit
        self.total += self._unit
        if self._unit > 1e12:
            self.counts /= self._unit
            self.total, self._unit = self.total / self._unit, 1.0

    @property
    def weight(self) -> float:
        """Observations, old ones decayed."""
        return self.total / self._unit

    def shares(self) -> Shares:
        """The share of each bucket; all 0 without observations."""
        return self.counts / self.total if self.total else self.counts


class OutputLengths:
    """Quantiles of output lengths by class. Memory is bounded: the class unseen longest is forgotten."""

    def __init__(self, prior_median: float = 256.0, prior_sigma: float = 1.2) -> None:
        self._prior = _log_normal(prior_median, prior_sigma)
        self._all = Histogram()
        self._classes: OrderedDict[str, Histogram] = OrderedDict()
        self._places: dict[str, int] = {}
        """Rows of ``_cumulative`` by class; forgotten as observations come in."""
        self._whole: dict[float, Shares] = {}
        self._make_room(MOST_CLASSES)
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
            self._places.clear()
            self._unseen = 0

    def total(self, class_name: str, quantile: float, generated: int = 0, most: int = 1 << 20) -> float:
        """The quantile of the whole output's length, given that ``generated`` tokens were not the end."""
        place = self._places.get(class_name)
        if place is None:
            self._accumulate({class_name})
            place = self._places[class_name]
        numbers, row = self._numbers, place * BUCKETS
        summed, bucket = numbers[row + BUCKETS - 1], bucket_of(generated)
        before = numbers[row + bucket] if generated else 0.0
        if generated and summed - before < OUTLIVED:
            expected = 1.5 * ENDS[bucket]
        else:
            target = before + quantile * (summed - before) - 1e-12
            expected = ENDS[bisect_left(numbers, target, row, row + BUCKETS) - row]
        return float(min(most, max(generated + 1, expected)))

    def remaining(self, class_name: str, quantile: float, generated: int = 0, most: int = 1 << 20) -> float:
        """The quantile of what is still to come, at least 0."""
        return max(0.0, self.total(class_name, quantile, generated, most) - generated)

    def remaining_of_each(
        self, class_names: Sequence[str], quantile: float, generated: Tokens, most: Tokens
    ) -> Shares:
        """``remaining`` of each of many, whose answers have begun or have not."""
        places = self._places
        if not places.keys() >= (names := set(class_names)):
            self._accumulate(names)
        rows = [places[name] for name in class_names]
        begun = generated > 0
        if not begun.any():
            return np.minimum(most, self._of_whole_answers(quantile)[rows])
        cumulative = self._cumulative[rows]
        summed, buckets = cumulative[:, -1], np.searchsorted(LAST_TOKENS[:-1], generated)
        before = np.where(begun, cumulative[np.arange(len(buckets)), buckets], 0.0)
        target = before + quantile * (summed - before) - 1e-12
        expected = EACH_END[(cumulative < target[:, None]).sum(axis=1)]
        outlived = begun & (summed - before < OUTLIVED)
        if outlived.any():
            expected = np.where(outlived, 1.5 * EACH_END[buckets], expected)
        total = np.minimum(most, np.maximum(generated + 1, expected))
        left: Shares = np.maximum(0.0, total - generated)
        return left

    def ends_within(
        self, class_names: Sequence[str], generated: Tokens, most: Tokens, tokens: Shares
    ) -> Shares:
        """The chance that each of ``n`` answers, ``generated`` tokens long, ends within so many further
        ``tokens``, ``[..., n]``. Lengths of a bucket are spread evenly over their logarithm."""
        places = self._places
        if not places.keys() >= (names := set(class_names)):
            self._accumulate(names)
        rows = np.array([places[name] for name in class_names], np.int64)
        before = self._share_up_to(rows, generated)
        left = self._cumulative[rows, -1] - before
        outlived = left < OUTLIVED
        chance = (self._share_up_to(rows, generated + tokens) - before) / np.where(outlived, 1.0, left)
        if outlived.any():
            chance = np.where(outlived, tokens / np.maximum(1.0, 0.5 * generated), chance)
        found: Shares = np.where(generated + tokens >= most, 1.0, np.minimum(1.0, chance))
        return np.where(tokens > 0, found, 0.0)

    def _share_up_to(self, rows: NDArray[np.int64], tokens: Tokens) -> Shares:
        """The share of answers in each row that are no longer than that."""
        place = np.minimum(BUCKETS_PER_OCTAVE * np.log2(np.maximum(1.0, tokens)), BUCKETS - 1)
        bucket = np.minimum(place.astype(np.int64), BUCKETS - 2)
        low, high = self._cumulative[rows, bucket], self._cumulative[rows, bucket + 1]
        share: Shares = low + (place - bucket) * (high - low)
        return share

    def _of_whole_answers(self, quantile: float) -> Shares:
        """The quantile of an answer that has not begun, by row."""
        found = self._whole.get(quantile)
        if found is None:
            cumulative = self._cumulative[: len(self._places)]
            target = quantile * cumulative[:, -1:] - 1e-12
            found = self._whole[quantile] = EACH_END[(cumulative < target).sum(axis=1)]
        return found

    def _accumulate(self, class_names: Set[str]) -> None:
        """Classes, each shrunk towards all classes, shrunk towards the prior."""
        if len(self._places) > 2 * MOST_CLASSES:
            self._places.clear()
        self._whole.clear()
        first, missing = len(self._places), sorted(class_names - self._places.keys())
        end = first + len(missing)
        if end > len(self._cumulative):
            self._make_room(2 * end)
        seen = [name for name in missing if name in self._classes]
        unseen = [name for name in missing if name not in self._classes]
        self._places.update(zip(chain(unseen, seen), range(first, end), strict=True))
        shares = _shrunk([self._all], PRIOR_WEIGHT, self._prior)
        self._cumulative[first : end - len(seen)] = shares
        if seen:
            histograms = [self._classes[name] for name in seen]
            self._cumulative[end - len(seen) : end] = _shrunk(histograms, CLASS_WEIGHT, shares)
        np.cumsum(self._cumulative[first:end], axis=1, out=self._cumulative[first:end])

    def _make_room(self, classes: int) -> None:
        """For as many rows; what was there stays."""
        before = self._cumulative if self._places else np.zeros((0, BUCKETS))
        self._cumulative: Shares = np.zeros((classes, BUCKETS))
        self._cumulative[: len(before)] = before
        self._numbers = self._cumulative.reshape(-1).data
        """The same, row after row: a number of it is read faster than one of an array."""

    def check_integrity(self) -> None:
        """Assert that memory is bounded and counts add up."""
        assert len(self._classes) <= MOST_CLASSES
        for histogram in (self._all, *self._classes.values()):
            assert math.isclose(float(histogram.counts.sum()), histogram.total, rel_tol=1e-6, abs_tol=1e-9)


def _shrunk(histograms: Sequence[Histogram], weight: float, others: Shares) -> Shares:
    """``[histograms, BUCKETS]``: what each observed, as if ``weight`` more observations were distributed like
    ``others``."""
    trust = np.array([histogram.weight / (histogram.weight + weight) for histogram in histograms])[:, None]
    shrunk: Shares = trust * np.array([histogram.shares() for histogram in histograms]) + (1 - trust) * others
    return shrunk


def _log_normal(median: float, sigma: float) -> Shares:
    def below(tokens: float) -> float:
        return 0.5 * (1 + math.erf(math.log(tokens / median) / (sigma * math.sqrt(2))))

    return np.diff([below(end) for end in ENDS], prepend=0.0)
